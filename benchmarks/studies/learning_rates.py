"""Does any simple rule choose a better learning rate than one constant for everything?

    python -m benchmarks.studies.learning_rates      judges rules on benchmarks/results/learning_rates.json

The rules of judging were written before the first fit. The losses had been read by then, and an earlier calculation had
found that Tinker's own formula does not beat a constant 3e-4 on its sweep.

Curves    A curve is the loss by learning rate of one study, model and rank. Judged are curves in nats per token with
          alpha = 16 or 32 whose best rate is bracketed: a lower and a higher rate were worse, or the higher diverged.
Regret    The loss at a rate minus the curve's lowest loss. Between measured rates, the loss is interpolated in the
          logarithm of the rate (PCHIP, which has its minimum at a measured rate). Beyond them it goes on as a line
          through the last two points, at low rates no higher than the loss before training. A run that diverged
          counts as a loss of 2, the limit from which Tinker's file leaves out a run.
Networks  Models of the same shapes, such as a base model and its instruct version, are one network, which is left out
          as a whole. A network's regret is the mean over its curves, and every network counts the same.
Rules     rate = 2^(a + b log2(width / 2048) + c log2(steps / 780) + d log2(batch size / 128)) with at most two of b,
          c and d other than 0. The constant has none. Of a grid (a in steps of 1/8, the others in steps of 1/10 from
          -1.5 to 1.5), the parameters with the lowest mean regret of the other networks are used; on a tie those
          closest to 0. Not fitted but shown for comparison: 5e-4, 3e-4, and Tinker's formula for Llama and Qwen.
Verdict   A rule beats the best constant if (1) the interval of the mean difference of their regrets lies below 0 over
          all networks, each left out in turn, and (2) over the networks of Tinker's sweep alone, the mean difference
          is at most 0.002 nats. The interval is of 20,000 bootstrap samples of the networks, 95% for all six rules
          together (Bonferroni).
Default   If a rule wins, it becomes `--learning-rate auto`. Otherwise the default is the best of 1, 2, 3 and 5 times a
          power of ten by the mean regret over all networks.
Limits    Width, steps and batch size vary together: within Tinker's sweep only the width varies. So that each result
          can be told from its assumptions, it is repeated (i) on the sweep alone, (ii) without the tiny model, (iii)
          with the rank nearest to 16 alone, (iv) with lines between the points, (v) with a divergence at a loss of 1,
          and (vi) with the studies that give only a best rate, for a constant and the width. Their curve is a parabola
          in log2(rate), whose curvature is the median over the judged curves, a quarter of it, and four times it.
Not measured: the sharpness of the loss in the first steps, as lr_range measures it. It needs runs of each model.
"""
