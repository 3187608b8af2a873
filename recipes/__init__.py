"""How the embedded model and the modules beside it were trained."""
