"""What a student might write: wrong solutions of the parts, and right ones that look different.

Each is a change of the function as it stands: (what is replaced, what stands there instead), or a
text that replaces the whole body. Each wrong one of a part is another kind of mistake.
test_exercises.py grades them.
"""

WRONG = {
    "self_kd_loss": [
        ("(teacher.exp() * ratio)", "(student.exp() * (student - teacher))"),
        ("temperature**2 * ", ""),
        ("alpha * kl + (1 - alpha) * ce,", "(1 - alpha) * kl + alpha * ce,"),
        (".sum() / n_tokens", ".sum() / len(labels)"),
        ("log_softmax(student_logits /", "log_softmax(student_logits.detach() /"),
    ],
    "learning_rate": [
        ("(step - warmup) / max(1, steps - warmup)", "step / steps"),
        ("if step < warmup:", "if False:"),
        ("WARMUP * steps", "100"),
        ("0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))",
         "(1 - (step - warmup) / max(1, steps - warmup))"),
        ("return peak * 0.5", "return 0.5"),
    ],
    "train_only": [
        ('self.audio_encoder.requires_grad_(part == "audio")', "pass"),
        ('part == "audio"', "True"),
        ("self.audio_encoder.embed_positions.requires_grad_(False)", "pass"),
        ("self.requires_grad_(False)", "pass"),
        ("self.lvlm.requires_grad_(True)", "self.requires_grad_(True)"),
    ],
    "answer_logits": [
        ("hidden[:, :-1][is_answer]", "hidden[:, 1:][is_answer]"),
        ("self.lvlm.lm_head(hidden[:, :-1][is_answer])",
         "self.lvlm.lm_head(hidden)[:, :-1][is_answer]"),
        ("(prefix, query, audio_tokens)", "(prefix, query)"),
        ("hidden[:, :-1][is_answer]", "hidden[:, :-1].transpose(0, 1)[is_answer.T]"),
        ("lm_head(hidden", "lm_head(hidden.detach()"),
    ],
    "embed": [
        ("audio_tokens[is_speech]", "audio_tokens.flatten(0, 1)"),
        ("audio_tokens[is_speech]", "audio_tokens.detach()[is_speech]"),
        ("ids.masked_fill(is_audio, 0)", "ids.masked_fill_(is_audio, 0)"),
        ("if pixels is not None:", "if False:"),
        ("image.to(x.dtype)", "image.flip(0).to(x.dtype)"),
    ],
    "encode_audio": [
        ("x.unflatten(1, (-1, 2)).mean(2)", "x[:, ::2]"),
        ("weight[: x.size(1)]", "weight[-x.size(1):]"),
        ("if padding.any():", "if False:"),
        ("x = encoder.layer_norm(x)", "pass"),
        ("mel.to(", "F.pad(mel, (0, 3000 - mel.size(2))).to("),
    ],
    "decode_query": [
        ("prefix.mask.sum(1, keepdim=True) +", "prefix.mask.size(1) +"),
        ("+ prefix.shift ", ""),
        ("cache = copy.copy(prefix.cache)", "cache = prefix.cache"),
        ("attention_mask=mask", "attention_mask=None"),
        (".tril()", ""),
    ],
    "forward_backward": [
        ("(batch, alpha, temperature, n_tokens)", "(batch, alpha, temperature)"),
        ("(loss * world_size)", "loss"),
        ("(loss * world_size).backward()", "model.zero_grad(); (loss * world_size).backward()"),
        ("n_tokens, = processes.all_reduce([n_tokens], device)", "pass"),
        ("sums += ", "sums = "),
    ],
    "collate": [
        ("question + prompt + answer)", "question + answer)"),
        ("[IGNORE] * len(question + prompt) + answer",
         "[IGNORE] * len(question) + prompt + answer"),
        ("left=not answers", "left=False"),
        ("count_audio_tokens(waves[-1])", "(len(waves[-1]) // TOKEN_SAMPLES)"),
        ('sample.get("after", instruction)', "instruction"),
    ],
    "paired_bootstrap": [
        ("0.025 * draws)], means[int(0.975", "0.05 * draws)], means[int(0.95"),
        ("b, dtype=torch.float64) - torch.tensor(a,", "a, dtype=torch.float64) - torch.tensor(b,"),
        ("(draws, len(difference))", "(draws, 30)"),
        ("torch.randint(len(difference), (draws, len(difference)), generator=generator)",
         "torch.arange(len(difference)).expand(draws, -1)"),
        ("""
    import random
    rng, n, means = random.Random(seed), len(a), []
    for _ in range(draws):
        means.append(100 / n * (sum(rng.choices(b, k=n)) - sum(rng.choices(a, k=n))))
    means.sort()
    return 100 * (sum(b) - sum(a)) / n, means[draws // 40], means[-draws // 40]
"""),
    ],
    "seed_interval": [
        (" / len(differences) ** 0.5", ""),
        ("statistics.stdev(", "statistics.pstdev("),
        ("half = t *", "half = 1.96 *"),
        ("len(differences) < 3", "True"),
        ("sum(before, []), sum(after, [])", "before[0], after[0]"),
    ],
}

RIGHT = {
    "self_kd_loss": [
        ('assert 0 <= alpha <= 1, f"alpha is a weight between 0 and 1, not {alpha}"',
         'if not 0 <= alpha <= 1:\n        raise ValueError("alpha")'),
        ("(teacher.exp() * ratio).sum()",
         'F.kl_div(student, teacher, reduction="sum", log_target=True)'),
    ],
    "learning_rate": [
        ("peak * (step + 1) / warmup", "peak * step / warmup"),
        ("round(", "int("),
    ],
    "train_only": [
        ("""
        for name, parameter in self.named_parameters():
            is_lvlm = name.startswith("lvlm.")
            is_wanted = is_lvlm == (stage == "vision-text")
            is_frozen = name.startswith("audio_encoder.") and part == "projector"
            parameter.requires_grad = is_wanted and not is_frozen and "embed_pos" not in name
"""),
        ("""
        reads = stage == "vision-text"
        self.lvlm.requires_grad_(reads)
        if self.audio_encoder is not None:
            self.audio_encoder.requires_grad_(not reads and part != "projector")
            self.projector.requires_grad_(not reads)
            self.audio_encoder.embed_positions.weight.requires_grad = False
"""),
    ],
    "answer_logits": [
        ("self.decode_query(prefix, query, audio_tokens)",
         "self.decode_query(prefix=prefix, query=query, audio_tokens=audio_tokens)"),
        ("""
        hidden = self.decode_query(prefix, query, audio_tokens)[0]
        rows, places = (query["labels"] != IGNORE).nonzero(as_tuple=True)
        return self.lvlm.lm_head(hidden[rows, places - 1]), query["labels"][rows, places]
"""),
    ],
    "embed": [
        ("ids.masked_fill(is_audio, 0)", "ids.clamp(min=0)"),
        ("""
        x = self.lvlm.get_input_embeddings()(torch.where(ids == AUDIO_PLACEHOLDER, 5, ids)).clone()
        if pixels is not None:
            x[ids == self.lvlm.config.image_token_id] = self.encode_images(pixels).to(x.dtype)
        if audio_tokens is not None:
            for b, slots in enumerate(ids == AUDIO_PLACEHOLDER):
                x[b, slots] = audio_tokens[b, : int(slots.sum())].to(x.dtype)
        return x
"""),
    ],
    "encode_audio": [
        ("x.unflatten(1, (-1, 2)).mean(2)", "F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)"),
        ("if padding.any():", "if True:"),
    ],
    "decode_query": [
        ("attention_mask=mask", "attention_mask=mask.int() if mask.dim() == 2 else mask"),
        ("""
        cache = type(prefix.cache)()
        for i, layer in enumerate(prefix.cache.layers):
            cache.update(layer.keys, layer.values, i)
        length, size = prefix.mask.size(1), query["ids"].size(1)
        mask = torch.cat([prefix.mask, query["mask"]], dim=1)
        part = query.get("document_ids", torch.zeros_like(query["ids"]))
        own = (part[:, :, None] == part[:, None]) & query["mask"][:, None]
        seen = torch.cat([prefix.mask[:, None].expand(-1, size, length), own.tril()], dim=2)
        positions = query.get("positions", (query["mask"].cumsum(1) - 1).clamp(min=0))
        positions = positions + prefix.mask.sum(1)[:, None] + prefix.shift
        out = self.lvlm.model.language_model(
            inputs_embeds=self.embed(query["ids"], None, audio_tokens), use_cache=True,
            attention_mask=seen[:, None], position_ids=positions, cache=cache)
        return out.last_hidden_state, Prefix(out.cache, mask, prefix.shift)
"""),
    ],
    "forward_backward": [
        ("world_size > 1 and i < len(micro_batches) - 1", "False"),
        ("torch.zeros(3, dtype=torch.float64)", "torch.zeros(3)"),
    ],
    "collate": [
        ("[IGNORE] * len(question + prompt) + answer",
         "[IGNORE] * (len(ids[-1]) - len(answer)) + answer"),
        ("pad(prefix_ids, tokenizer.pad_token_id)",
         "pad(rows=prefix_ids, value=tokenizer.pad_token_id, left=False)"),
    ],
    "paired_bootstrap": [
        ("means[int(0.025 * draws)], means[int(0.975 * draws)]",
         "means.quantile(0.025), means.quantile(0.975)"),
        ("""
    import numpy as np
    difference = 100 * (np.array(b) - np.array(a))
    draws = np.random.default_rng(seed).choice(difference, (draws, len(a)))
    return difference.mean(), *np.percentile(draws.mean(1), [2.5, 97.5])
"""),
    ],
    "seed_interval": [
        ('"Student\'s t over the seeds"', '"t"'),
        ("""
    if len(before) < 3:
        a = [score for seed in before for score in seed]
        b = [score for seed in after for score in seed]
        return paired_bootstrap(a, b), "over questions"
    d = 100 * (torch.tensor(after) - torch.tensor(before)).mean(1)
    half = STUDENT_T[min(len(d) - 3, 7)] * d.std() / len(d) ** 0.5
    return (d.mean().item(), (d.mean() - half).item(), (d.mean() + half).item()), "over seeds"
"""),
    ],
}
