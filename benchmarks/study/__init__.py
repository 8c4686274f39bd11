"""The study: which token reduction learns best, and with which settings (configs/study, scripts/study.py)."""
