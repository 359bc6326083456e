"""Models of other papers, trained on equal terms.

Networks, latent size, likelihoods, weights, beta, optimiser, seeds and number of epochs are those of Concord. The posterior of
a subset and the objective differ.
"""
