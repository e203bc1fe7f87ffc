"""Faithful ports of published networks, each with a loader of its published weights."""
