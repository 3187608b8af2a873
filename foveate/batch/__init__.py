"""Many questions about many images: tables in, Parquet with answers out, shard by shard."""
