"""What a command can be told, on its command line and in files."""
from .parser import Section, option, parse, resolved
from .run import TrainingOptions

__all__ = ["Section", "TrainingOptions", "option", "parse", "resolved"]
