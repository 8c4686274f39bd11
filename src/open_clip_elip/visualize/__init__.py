"""What token reduction keeps of pictures, to be seen: `python -m open_clip_elip.visualize --help`."""
