"""What a run says of itself: report.json and report.html."""
