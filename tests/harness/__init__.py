"""What the tests stand on: real database servers, a proxy that cuts, real child processes.

``backends`` finds what this machine has, ``fleet`` runs servers, ``engines`` watches connections,
``proxy`` breaks the network, ``processes`` runs functions in other processes.
"""
