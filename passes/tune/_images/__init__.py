"""Parts of images that recipes train on: sub-images, patches, windows of noise."""
