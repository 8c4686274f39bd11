"""What models cost in training: parameters, operations, tokens, time, memory.

The command is `python -m open_clip_elip.profile`.

| module | job |
|---|---|
| `models` | names with options, such as `ViT-S-16-ELIP:scoring_depth=1`, to models |
| `captions` | how long the captions of a batch are |
| `step` | one training step of one model |
| `flops` | operations of a step of any kind, counted by torch on the modules' own calls |
| `memory` | what it keeps for the backward pass, its peak, the largest batch that fits |
| `timing` | seconds of several steps in turn, and their spread |
| `report` | one model's figures; tables, Markdown, the plot |
"""
