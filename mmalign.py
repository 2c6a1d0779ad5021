"""MMAlign: which of two sentences about a picture is right, when asked in writing and aloud?

    python mmalign.py                                          # base, after alignment and every alpha of seed 0
    python mmalign.py runs/shapes/vision-audio-a*-s[012]       # any runs; those that differ by seed alone are averaged

The paper's benchmark asks for relations ("a star left of a circle" or "a circle left of a star") and for
attributes ("a red star and a blue circle" or "a blue star and a red circle"): the words are the same, so that only who
looks at the picture can tell. In the built-in world the questions stand in the test part beside the other kinds. They
are not among the spoken questions that `vision-audio` trains on, so what a run can do here it has carried over.

Right is an answer that contains the true sentence and not the false one, once an exact echo of the question is taken
away. Who picks one of the two blindly is right half of the time; who says anything else is wrong.
"""

import data
import eval
import shapes

if __name__ == "__main__":
    args = eval.arguments(__doc__).parse_args()
    with data.readable_errors():
        eval.report(args, shapes.ALIGN_KINDS, "MMAlign mean")
