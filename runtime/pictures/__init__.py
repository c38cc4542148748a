"""Output for people to look at: the picture and the page of a result, and the contact sheet of a data set."""
