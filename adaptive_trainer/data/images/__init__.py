"""Files of images: where they lie, how they are read, cropped and normalised."""
