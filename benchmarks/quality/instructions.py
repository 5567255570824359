"""What a model that was not trained on the tasks is told before it is asked."""

INSTRUCTIONS = """\
You see videos whose frames show landscape. Some frames have a small red sign with a capital \
letter and a digit beside it, such as K7. Between videos there may be text. Questions are written \
in a short notation, where K stands for any letter:
K? - the digit on the sign with K (one digit)
K first? - K is shown with several digits: the digit of the earliest sign (one digit)
K last? - the digit of the latest sign with K (one digit)
K change? - the digits of the earliest and of the latest sign with K (two digits)
K count? - in how many frames a sign with K is shown (a number)
K next? - the sign in the frame directly after the one that shows K (a letter and a digit)
KA first? - which of the two letters is shown earlier (one letter)
page37? - the sign in the video below the heading "page37:" (a letter and a digit)
note:K? - the digit behind K in the text "note:K5;" (one digit; signs with K do not count)
A question that stands before the video is answered after it. Answer with the letters and digits \
alone: no words, no spaces, no punctuation."""
