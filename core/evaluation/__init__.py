"""What the result is worth: metrics of the original and of the result on data no pass has seen."""
