"""Merging what peers trained: encoding, commitment, reduction, and the step that follows."""
