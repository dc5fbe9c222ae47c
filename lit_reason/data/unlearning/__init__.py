"""Rows to forget and rows to retain: reading, pairing, and what their scores are measured on"""
