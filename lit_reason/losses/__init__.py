"""Losses of whole answers: functions of their log-probabilities, for any regime"""
