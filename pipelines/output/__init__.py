"""What `detect.py` writes of videos: records to go on from, tables, subtitles, pictures, a page."""
