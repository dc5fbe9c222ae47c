"""Texts with a label each: whose preference they show, or what they are about."""
