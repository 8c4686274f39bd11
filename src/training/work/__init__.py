"""What the commands do: `work` of each, for the command of the same name, once its options are right."""
