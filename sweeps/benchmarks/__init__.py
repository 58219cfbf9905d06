"""What a search finds in so many trials, against chance and the base recipe."""
