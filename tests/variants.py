"""What a student might write: wrong solutions of the parts, and right ones that look different.

Each is a change of the function as it stands: (what is replaced, what stands there instead), or a
text that replaces the whole body. test_exercises.py grades them.
"""

WRONG = {
    "self_kd_loss": [
        ("(teacher.exp() * ratio)", "(student.exp() * (student - teacher))"),
        ("(teacher.exp() * ratio)", "(-teacher.exp() * student)"),
        ("(teacher.exp() * ratio)", "ratio"),
        ("(teacher.exp() * ratio).sum() / n_tokens", "(teacher.exp() * ratio).mean()"),
        ("temperature**2 * ", ""),
        ("temperature**2", "temperature"),
        ("teacher_logits.to(dtype) / temperature", "teacher_logits.to(dtype)"),
        ("cross_entropy(student_logits,", "cross_entropy(student_logits / temperature,"),
        ("alpha * kl + (1 - alpha) * ce,", "(1 - alpha) * kl + alpha * ce,"),
        ("alpha * kl + (1 - alpha) * ce,", "kl + ce,"),
        ("* ce, kl, ce", "* ce, alpha * kl, (1 - alpha) * ce"),
        ("* ce, kl, ce", "* ce, ce, kl"),
        (".sum() / n_tokens", ".sum() / len(labels)"),
        ('reduction="sum") / n_tokens', 'reduction="mean")'),
        ("log_softmax(student_logits / temperature, dim=-1)",
         "softmax(student_logits / temperature, dim=-1).log()"),
        ("torch.promote_types(student_logits.dtype, torch.float32)", "student_logits.dtype"),
        ("log_softmax(student_logits /", "log_softmax(student_logits.detach() /"),
        ("assert 0 <= alpha <= 1", "assert alpha <= 1"),
        ("assert 0 <= alpha <= 1", "assert True"),
    ],
    "learning_rate": [
        ("(step - warmup) / max(1, steps - warmup)", "step / steps"),
        ("max(1, steps - warmup)", "steps"),
        ("if step < warmup:", "if False:"),
        ("WARMUP * steps", "0.1 * steps"),
        ("WARMUP * steps", "100"),
        ("0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))",
         "(1 - (step - warmup) / max(1, steps - warmup))"),
        ("math.pi *", "2 * math.pi *"),
        ("0.5 * (1 + math.cos(math.pi *", "(math.cos(math.pi / 2 *"),
        ("peak * 0.5 *", "0.1 * peak + 0.9 * peak * 0.5 *"),
        ("return peak * (step + 1)", "return (step + 1)"),
        ("return peak * 0.5", "return 0.5"),
        ("(step + 1) / warmup", "((step + 1) / warmup) ** 2"),
    ],
    "train_only": [
        ('self.audio_encoder.requires_grad_(part == "audio")', "pass"),
        ('part == "audio"', "True"),
        ("self.projector.requires_grad_(True)", "pass"),
        ("self.projector.requires_grad_(True)", "self.projector.weight.requires_grad_(True)"),
        ("self.audio_encoder.embed_positions.requires_grad_(False)", "pass"),
        ("self.requires_grad_(False)", "pass"),
        ("self.requires_grad_(False)", "self.lvlm.requires_grad_(False)"),
        ("self.lvlm.requires_grad_(True)", "self.requires_grad_(True)"),
        ("self.lvlm.requires_grad_(True)", "self.lvlm.model.language_model.requires_grad_(True)"),
        ('stage == "vision-text"', 'stage != "audio-text"'),
        ('stage == "vision-text"', "False"),
    ],
    "answer_logits": [
        ("hidden[:, :-1][is_answer]", "hidden[:, 1:][is_answer]"),
        ("self.lvlm.lm_head(hidden[:, :-1][is_answer])",
         "self.lvlm.lm_head(hidden)[:, :-1][is_answer]"),
        ("(prefix, query, audio_tokens)", "(prefix, query)"),
        ("hidden[:, :-1][is_answer]", "hidden[:, :-1].transpose(0, 1)[is_answer.T]"),
        ("labels != IGNORE", "(labels != IGNORE) & (labels.roll(-1, 1) != IGNORE)"),
        ("labels != IGNORE", "labels > 0"),
        ("lm_head(hidden", "lm_head(hidden.detach()"),
        ("logits, labels[is_answer]", "logits, labels"),
        ("self.lvlm.lm_head(hidden[:, :-1][is_answer])", "hidden[:, :-1][is_answer]"),
        ("""
        hidden, _ = self.continue_prefix(prefix, query, audio_tokens)
        is_answer = query["labels"] != IGNORE
        return self.lvlm.lm_head(hidden[is_answer]), query["labels"][is_answer]
"""),
        ("""
        hidden, _ = self.continue_prefix(prefix, query, audio_tokens)
        labels = query["labels"][:, 1:].T
        hidden = hidden[:, :-1].transpose(0, 1)
        return self.lvlm.lm_head(hidden[labels != IGNORE]), labels[labels != IGNORE]
"""),
    ],
    "embed": [
        ("audio_tokens[is_speech]", "audio_tokens.flatten(0, 1)"),
        ("audio_tokens[is_speech]", "audio_tokens.detach()[is_speech]"),
        ("audio_tokens[is_speech]", "audio_tokens.transpose(0, 1)[is_speech.T]"),
        ("places < audio_slots", "places <= audio_slots"),
        ("ids.masked_fill(audio_slots, 0)", "ids"),
        ("ids.masked_fill(audio_slots, 0)", "ids.masked_fill_(audio_slots, 0)"),
        ("if pixels is not None:", "if False:"),
        ("if audio_tokens is not None:", "if False:"),
        ("image.to(x.dtype)", "image.flip(0).to(x.dtype)"),
        ("image.to(x.dtype)", "image[:4].repeat(99, 1).to(x.dtype)"),
        ("image_slots[..., None]", "image_slots[..., None] | True"),
        ("x = x.masked_scatter(audio_slots[..., None], audio_tokens[is_speech].to(x.dtype))",
         "x = torch.cat([audio_tokens, x[:, audio_tokens.size(1):]], dim=1)"),
    ],
    "hear": [
        ("x.unflatten(1, (-1, 2)).mean(2)", "x[:, ::2]"),
        (".mean(2)", ".sum(2)"),
        (".mean(2)", ".amax(2)"),
        ("x.unflatten(1, (-1, 2)).mean(2)", "x"),
        ("x = F.gelu(encoder.conv2(x))", "x = encoder.conv2(x)"),
        ("x = F.gelu(encoder.conv2(x))", "x = F.relu(encoder.conv2(x))"),
        ("x = x + encoder.embed_positions", "x = x + 0 * encoder.embed_positions"),
        ("weight[: x.size(1)]", "weight[-x.size(1):]"),
        ("n_frames[:, None] // 2", "n_frames[:, None]"),
        ("n_frames[:, None] // 2", "n_frames[:, None] // 4"),
        ("if padding.any():", "if False:"),
        (">= n_frames", "> n_frames"),
        ("x = checkpoint(", "x, mask = (layer(x, mask), None) if True else checkpoint("),
        ("x = encoder.layer_norm(x)", "pass"),
        ("mean(2)", "mean(2)\n        x = encoder.layer_norm(x)"),
        ("encoder.layers:", "encoder.layers[:1]:"),
        ("return self.projector(x)", "return x"),
        ("mel.to(", "F.pad(mel, (0, 3000 - mel.size(2))).to("),
        ("x = x + encoder", "x = x.detach() + encoder"),
        ("if mel is None:", "if False:"),
    ],
    "continue_prefix": [
        ("prefix.mask.sum(1, keepdim=True) +", "prefix.mask.size(1) +"),
        ("prefix.mask.sum(1, keepdim=True) +", ""),
        ('if "part" in query:', "if False:"),
        ("+ prefix.shift ", ""),
        ("Prefix(cache, mask, prefix.shift)", "prefix"),
        ("Prefix(cache, mask, prefix.shift)", "Prefix(cache, mask, 0)"),
        ("Prefix(cache, mask, prefix.shift)", "Prefix(cache, prefix.mask, prefix.shift)"),
        ("Prefix(cache, mask, prefix.shift)", "Prefix(prefix.cache, mask, prefix.shift)"),
        ("cache = copy.copy(prefix.cache)", "cache = prefix.cache"),
        ("cache.layers = [copy.copy(layer) for layer in cache.layers]", "pass"),
        ("cache = copy.copy(prefix.cache)", "cache = copy.deepcopy(prefix.cache)"),
        ("past_key_values=cache", "past_key_values=None"),
        ("attention_mask=mask", "attention_mask=None"),
        ('(query["mask"].cumsum(1) - 1).clamp(min=0)',
         'torch.arange(query["ids"].size(1))[None]'),
        ("self.embed(query[\"ids\"], audio_tokens=audio_tokens)", 'self.embed(query["ids"])'),
        (".tril()", ""),
        ("prefix.mask[:, None].expand(", "torch.ones_like(prefix.mask)[:, None].expand("),
        ("prefix.mask[:, None].expand(", "torch.zeros_like(prefix.mask)[:, None].expand("),
        ('query.get("positions", positions)', "positions"),
    ],
    "forward_backward": [
        ("(batch, alpha, temperature, n_tokens)", "(batch, alpha, temperature)"),
        ("(batch, alpha, temperature, n_tokens)", "(batch, 1.0, temperature, n_tokens)"),
        ("(batch, alpha, temperature, n_tokens)", "(batch, alpha, 1.0, n_tokens)"),
        ("(batch, alpha, temperature, n_tokens)", "(batch, temperature, alpha, n_tokens)"),
        ("(loss * world_size)", "loss"),
        ("(loss * world_size)", "(3 * loss * world_size)"),
        ("(loss * world_size)", "(loss * world_size / len(micro_batches))"),
        ("(loss * world_size)", "(loss * n_tokens)"),
        ("(loss * world_size).backward()", "model.zero_grad(); (loss * world_size).backward()"),
        ("n_tokens, = processes.all_sum([n_tokens], device)", "pass"),
        ("processes.all_sum(sums.tolist(), device)", "sums.tolist()"),
        ("sums += ", "sums = "),
        ("sums += ", "sums += world_size * "),
        ("[loss, kl, ce]", "[loss, ce, kl]"),
        ("i < len(micro_batches) - 1", "True"),
        ("enumerate(micro_batches)", "enumerate(micro_batches[:1])"),
    ],
    "collate": [
        ("slot + turn + answer)", "slot + answer)"),
        ("labels.append([IGNORE] * len(slot + turn) + answer)",
         "labels.append([IGNORE] * (len(slot + turn) - 1) + answer + [IGNORE])"),
        ("labels.append([IGNORE] * len(slot + turn) + answer)",
         "labels.append(answer + [IGNORE] * len(slot + turn))"),
        ("[IGNORE] * len(slot + turn) + answer", "[IGNORE] * len(slot) + turn + answer"),
        ("[IGNORE] * len(slot + turn) + answer", "slot + turn + answer"),
        ("left=not answers", "left=True"),
        ("left=not answers", "left=False"),
        ("left=not answers", "left=answers"),
        ("pad(prefix_ids, tokenizer.pad_token_id)",
         "pad(prefix_ids, tokenizer.pad_token_id, True)"),
        ("pad(labels, IGNORE", "pad(labels, tokenizer.pad_token_id"),
        ('s["answer"] + s.get("end", end)', 's["answer"]'),
        ('s.get("end", end)', "end"),
        ("count_audio_tokens(waves[-1])", "(len(waves[-1]) // TOKEN_SAMPLES)"),
        ("count_audio_tokens(waves[-1])", 'count_audio_tokens(sample["wave"])'),
        ('"" if "question" in sample else settings["instruction"]', '""'),
        ('"" if "question" in sample else settings["instruction"]', 'settings["instruction"]'),
        ('sample.get("after", instruction)', "instruction"),
        ('settings.get("audio_seconds", 0)', "0"),
        ("join_pictures(samples)", "join_pictures(samples[:1])"),
        ('batch["audio"] = query(slots)', 'batch["audio"] = query(question_ids)'),
        ("if answers:", "if True:"),
    ],
    "paired_bootstrap": [
        ("0.025 * draws)], means[int(0.975", "0.0025 * draws)], means[int(0.9975"),
        ("0.025 * draws)], means[int(0.975", "0.05 * draws)], means[int(0.95"),
        ("low.item(), high.item()", "4 * low.item(), 4 * high.item()"),
        ("return difference.mean().item()", "return 0.0"),
        ("100 * (", "("),
        ("b, dtype=torch.float64) - torch.tensor(a,", "a, dtype=torch.float64) - torch.tensor(b,"),
        ("(draws, len(difference))", "(draws, 30)"),
        ("difference[questions]", "difference[questions.sort().values[:, ::2]]"),
        ("torch.randint(len(difference), (draws, len(difference)), generator=generator)",
         "torch.arange(len(difference)).expand(draws, -1)"),
        ("generator=generator", ""),
        ("""
    import random
    rng, n, means = random.Random(seed), len(a), []
    for _ in range(draws):
        means.append(100 / n * (sum(rng.choices(b, k=n)) - sum(rng.choices(a, k=n))))
    means.sort()
    return 100 * (sum(b) - sum(a)) / n, means[draws // 40], means[-draws // 40]
"""),
        ("""
    d = [100 * (y - x) for x, y in zip(a, b)]
    half = 1.96 * statistics.stdev(d) / len(d) ** 0.5
    return statistics.fmean(d), statistics.fmean(d) - half, statistics.fmean(d) + half
"""),
    ],
    "seed_interval": [
        (" / len(differences) ** 0.5", ""),
        (" / len(differences) ** 0.5", " / len(differences)"),
        ("statistics.stdev(", "statistics.pstdev("),
        ("half = t *", "half = 1.96 *"),
        ("half = t *", "half = t / 2 *"),
        ("len(differences), 10) - 3]", "len(differences), 9) - 2]"),
        ("len(differences) < 3", "len(differences) < 2"),
        ("len(differences) < 3", "True"),
        ("100 * (", "("),
        ("zip(before, after)", "zip(after, before)"),
        ("sum(before, []), sum(after, [])", "before[0], after[0]"),
        ("sum(before, []), sum(after, [])", "sum(after, []), sum(before, [])"),
        ('"bootstrap over the questions"', '"Student\'s t over the seeds"'),
        ("""
    import random
    differences = [100 * (statistics.fmean(b) - statistics.fmean(a)) for a, b in zip(before, after)]
    n = len(differences)
    if n < 3:
        return paired_bootstrap(sum(before, []), sum(after, [])), "questions"
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(differences, k=n)) for _ in range(2000))
    return (statistics.fmean(differences), means[50], means[-50]), "seeds"
"""),
    ],
}

RIGHT = {
    "self_kd_loss": [
        ("torch.promote_types(student_logits.dtype, torch.float32)", "torch.float32"),
        ('assert 0 <= alpha <= 1, f"alpha is a weight between 0 and 1, not {alpha}"',
         'if not 0 <= alpha <= 1:\n        raise ValueError("alpha")'),
        ("if alpha < 1:", "if True:"),
        ("(teacher.exp() * ratio).sum()",
         'F.kl_div(student, teacher, reduction="sum", log_target=True)'),
        ("(teacher.exp() * ratio).sum()",
         "(F.softmax(teacher_logits.to(dtype) / temperature, -1) * ratio).sum()"),
        ("log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)",
         "softmax(teacher_logits.to(dtype) / temperature, dim=-1).log()"),
        ('F.cross_entropy(student_logits, labels, reduction="sum")',
         "-F.log_softmax(student_logits, -1)[torch.arange(len(labels)), labels].sum()"),
        ("""
    if alpha < 0 or alpha > 1:
        raise ValueError("alpha lies between 0 and 1")
    student_logits = student_logits.float()
    n = n_tokens or len(labels)
    ce = F.nll_loss(student_logits.log_softmax(-1), labels, reduction="sum") / n
    if alpha == 0:
        return ce, torch.zeros(()), ce
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    student = (student_logits / temperature).log_softmax(-1)
    kl = F.kl_div(student, teacher.exp(), reduction="none").sum(-1).sum() / n * temperature ** 2
    return (1 - alpha) * ce + alpha * kl, kl, ce
"""),
    ],
    "learning_rate": [
        ("peak * (step + 1) / warmup", "peak * step / warmup"),
        ("round(", "int("),
        ("round(", "math.ceil("),
        ("/ max(1, steps - warmup)", "/ max(1, steps - 1 - warmup)"),
        ("""
    warm = steps * WARMUP
    if step < warm:
        return peak * step / warm
    return peak * math.cos(math.pi / 2 * (step - warm) / (steps - warm)) ** 2
"""),
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
        ("(prefix, query, audio_tokens)", "(prefix, query, audio_tokens=audio_tokens)"),
        ("self.continue_prefix(prefix, query, audio_tokens)",
         "self.continue_prefix(prefix=prefix, query=query, audio_tokens=audio_tokens)"),
        ("""
        hidden = self.continue_prefix(prefix, query, audio_tokens)[0]
        rows, places = (query["labels"] != IGNORE).nonzero(as_tuple=True)
        return self.lvlm.lm_head(hidden[rows, places - 1]), query["labels"][rows, places]
"""),
        ("""
        hidden = self.continue_prefix(prefix, query, audio_tokens)[0]
        logits, answers = [], []
        for states, labels in zip(hidden, query["labels"]):
            for place in range(1, len(labels)):
                if labels[place] != IGNORE:
                    logits.append(self.lvlm.lm_head(states[place - 1]))
                    answers.append(labels[place])
        return torch.stack(logits), torch.stack(answers)
"""),
        ("self.lvlm.lm_head(hidden[:, :-1][is_answer])",
         "F.linear(hidden[:, :-1][is_answer], self.lvlm.lm_head.weight)"),
    ],
    "embed": [
        ("ids.masked_fill(audio_slots, 0)", "ids.clamp(min=0)"),
        ("""
        x = self.lvlm.get_input_embeddings()(torch.where(ids == AUDIO_SLOT, 5, ids)).clone()
        if pixels is not None:
            x[ids == self.lvlm.config.image_token_id] = self.see(pixels).to(x.dtype)
        if audio_tokens is not None:
            for b, slots in enumerate(ids == AUDIO_SLOT):
                x[b, slots] = audio_tokens[b, : int(slots.sum())].to(x.dtype)
        return x
"""),
        ("""
        x = self.lvlm.get_input_embeddings()(ids.clamp(0))
        if audio_tokens is not None:
            slots = ids == AUDIO_SLOT
            places = (slots.cumsum(1) - 1).clamp(0, audio_tokens.size(1) - 1)
            rows = torch.arange(len(ids))[:, None]
            x = torch.where(slots[..., None], audio_tokens[rows, places], x)
        if pixels is not None:
            image = torch.cat(list(self.lvlm.get_image_features(**pixels).pooler_output))
            x = x.masked_scatter((ids == self.lvlm.config.image_token_id)[..., None], image)
        return x
"""),
    ],
    "hear": [
        ("if padding.any():", "if True:"),
        ("x.unflatten(1, (-1, 2)).mean(2)", "F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)"),
        ("x.unflatten(1, (-1, 2)).mean(2)", "(x[:, ::2] + x[:, 1::2]) / 2"),
        ("""
        if mel is None:
            return None
        encoder = self.audio_encoder
        x = F.gelu(encoder.conv1(mel))
        x = F.gelu(encoder.conv2(x)).permute(0, 2, 1)
        x = x + encoder.embed_positions(torch.arange(x.size(1)))
        visible = torch.arange(x.size(1))[None] < (n_frames // 2)[:, None]
        for layer in encoder.layers:
            x = layer(x, visible[:, None, None, :].expand(-1, 1, x.size(1), -1))
        x = self.projector(encoder.layer_norm(x))
        return x.reshape(len(x), -1, 2, x.size(-1)).mean(2)
"""),
        ("""
        if mel is None:
            return None
        encoder, rows = self.audio_encoder, []
        for clip, n in zip(mel, n_frames.tolist()):
            x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(clip[None, :, :n])))).transpose(1, 2)
            x = x + encoder.embed_positions.weight[: n // 2]
            for layer in encoder.layers:
                x = layer(x, None)
            x = encoder.layer_norm(x)[0].view(n // 4, 2, -1).mean(1)
            rows.append(F.pad(self.projector(x), (0, 0, 0, mel.size(2) // 4 - n // 4)))
        return torch.stack(rows)
"""),
    ],
    "continue_prefix": [
        ("attention_mask=mask", "attention_mask=mask.int() if mask.dim() == 2 else mask"),
        ("""
        cache = type(prefix.cache)()
        for i, layer in enumerate(prefix.cache.layers):
            cache.update(layer.keys, layer.values, i)
        length, size = prefix.mask.size(1), query["ids"].size(1)
        mask = torch.cat([prefix.mask, query["mask"]], dim=1)
        part = query.get("part", torch.zeros_like(query["ids"]))
        own = (part[:, :, None] == part[:, None]) & query["mask"][:, None]
        seen = torch.cat([prefix.mask[:, None].expand(-1, size, length), own.tril()], dim=2)
        positions = query.get("positions", (query["mask"].cumsum(1) - 1).clamp(min=0))
        positions = positions + prefix.mask.sum(1)[:, None] + prefix.shift
        out = self.lvlm.model.language_model(
            inputs_embeds=self.embed(query["ids"], None, audio_tokens), use_cache=True,
            attention_mask=seen[:, None], position_ids=positions, past_key_values=cache)
        return out.last_hidden_state, Prefix(out.past_key_values, mask, prefix.shift)
"""),
    ],
    "forward_backward": [
        ("world_size > 1 and i < len(micro_batches) - 1", "False"),
        ("torch.zeros(3, dtype=torch.float64)", "torch.zeros(3)"),
        ("""
    n = 0
    for batch in micro_batches:
        n += int(((batch["audio"] or batch["text"])["labels"][:, 1:] != -100).sum())
    n = processes.all_sum([n], device)[0]
    sums = [0.0, 0.0, 0.0]
    for batch in micro_batches:
        with processes.half_precision(device):
            terms = model(processes.to_device(batch, device), alpha, temperature, n_tokens=n)
        (terms[0] * world_size).backward()
        sums = [a + b.item() for a, b in zip(sums, terms)]
    return torch.tensor(processes.all_sum(sums, device))
"""),
    ],
    "collate": [
        ("families.check_length(", "(lambda *_: None)("),
        ("[IGNORE] * len(slot + turn) + answer",
         "[IGNORE] * (len(ids[-1]) - len(answer)) + answer"),
        ("pad(prefix_ids, tokenizer.pad_token_id)",
         "pad(rows=prefix_ids, value=tokenizer.pad_token_id, left=False)"),
        ('"text": None, "mel": None,', '"text": None, "mel": None, "answers": answer_ids,'),
    ],
    "paired_bootstrap": [
        ("means[int(0.025 * draws)], means[int(0.975 * draws)]",
         "means.quantile(0.025), means.quantile(0.975)"),
        ("""
    import random
    rng, means = random.Random(seed), []
    for _ in range(draws):
        total = 0.0
        for _ in range(len(a)):
            i = rng.randrange(len(a))
            total += b[i] - a[i]
        means.append(100 * total / len(a))
    means.sort()
    low, high = round(0.025 * draws), round(0.975 * draws)
    return 100 * (sum(b) - sum(a)) / len(a), means[low], means[high]
"""),
        ("""
    import numpy as np
    difference = 100 * (np.array(b) - np.array(a))
    draws = np.random.default_rng(seed).choice(difference, (draws, len(a)))
    return difference.mean(), *np.percentile(draws.mean(1), [2.5, 97.5])
"""),
    ],
    "seed_interval": [
        ('"Student\'s t over the seeds"', '"t"'),
        ("STUDENT_T[min(len(differences), 10) - 3]",
         "STUDENT_T[len(differences) - 3] if len(differences) < 11 else 2.05"),
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
