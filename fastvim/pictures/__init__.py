"""What models make of images, drawn."""
