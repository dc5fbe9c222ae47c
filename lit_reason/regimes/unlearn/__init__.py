"""Unlearning: take some rows out of what a model remembers, and keep the others"""
