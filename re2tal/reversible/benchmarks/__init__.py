"""What reversible training costs and saves, measured: see README.md in this folder."""
