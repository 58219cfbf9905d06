"""Videos encoded anew and packed into Parquet files: writing, finding and reading them."""
