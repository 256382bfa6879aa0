"""Tests that prove what the README says."""
