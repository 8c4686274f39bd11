"""What models cost in training: parameters, operations, tokens, time, memory; `python -m open_clip_elip.profile`."""
