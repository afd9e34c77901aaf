"""The run report: from the files and predictions of a run to one HTML page."""
