"""Names, alerts and plots of metrics that training and the pages of a run share. Imports no torch."""
