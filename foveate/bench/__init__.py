"""FoveaBench: questions whose evidence is known, asked with and without visual tokens removed."""
