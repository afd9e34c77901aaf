"""Files of other projects to our parameters and back."""
