"""Helpers of the six stages, a file a job."""
