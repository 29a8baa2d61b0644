"""Accuracy of models on problems with known answers, and tests of whether two models differ."""
