"""What a person looks at: the picture and the page of a result, the contact sheet of a data set."""
