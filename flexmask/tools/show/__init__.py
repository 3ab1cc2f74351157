"""One packed row as text and as a picture."""
