"""What the evaluation commands share: labelled images and captions, encoding them on all processes, results on disk."""
