"""Stepwise DPO (sDPO, arXiv 2403.19270): training in stages, each with the previous stage's model as reference."""
