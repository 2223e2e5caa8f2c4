"""The picture: style, figure, and labels that keep out of each other's way."""
