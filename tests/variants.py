"""What a student might write: wrong solutions of the parts, and right ones that look different.

Each is a change of the function as it stands: (what is replaced, what stands there instead). Each
wrong one of a part is another kind of mistake: a formula, a lost gradient, a changed argument, a
value that the caller cannot use, the end of a range. test_exercises.py grades them.
"""

WRONG = {
    "self_kd_loss": [
        ("temperature**2 * ", ""),
        (".sum() / n_tokens", ".sum() / max(1, len(labels))"),
        ("student_logits / temperature,", "student_logits.detach() / temperature,"),
        ("teacher_logits.to(dtype) /", "teacher_logits.div_(temperature) /"),
        ("(teacher_logits.to(dtype) / temperature, dim=-1)", "(teacher_logits / temperature, -1)"),
    ],
    "learning_rate": [
        ("(step - warmup) / max(1, steps - warmup)", "step / steps"),
        ("max(1, round(WARMUP * steps))", "max(30, round(WARMUP * steps))"),
        ("0.5 * (1 + math.cos(", "(1 - 0.5 * (1 + math.cos("[1:]),
        ("peak * (step + 1) / warmup", "peak * ((step + 1) / warmup) ** 2"),
        ("return peak * 0.5", "return 0.5"),
    ],
    "train_only": [
        ('stage == "vision-text"', 'stage == part == "vision-text"'),
        ('for name in ("embed_positions", "audio_bos_eos_token"):', "for name in ():"),
        ("self.requires_grad_(False)", "self.audio_encoder.requires_grad_(False)"),
        ("self.requires_grad_(False)", 'assert part != "lvlm"'),
        ('(part == "audio")', '(part == "audio" or stage == "audio-text")'),
    ],
    "answer_logits": [
        ("hidden[:, :-1][is_answer]", "hidden[:, 1:][is_answer]"),
        ("lm_head)(hidden[:, :-1][is_answer])", "lm_head)(hidden)[:, :-1][is_answer]"),
        ("(prefix, query, audio_tokens)", "(prefix, query)"),
        ("hidden[:, :-1][is_answer]", "torch.stack([*hidden[:, :-1][is_answer]])"),
        ("lm_head)(hidden", "lm_head)(hidden.detach()"),
    ],
    "embed": [
        ("audio_tokens[is_speech]", "audio_tokens.flatten(0, 1)"),
        ("(ids.masked_fill(is_audio, 0))", "(ids.masked_fill(is_audio, 0)).detach()"),
        ("ids.masked_fill(is_audio, 0)", "ids.masked_fill_(is_audio, 0)"),
        ("if pixels is not None:", "if pixels is not None and audio_tokens is None:"),
        ("self.encode_images(pixels)", "self.lvlm.get_image_features(**pixels).pooler_output[0]"),
    ],
    "encode_audio": [
        ("x.unflatten(1, (-1, 2)).mean(2)", "x[:, ::2]"),
        ("weight[: x.size(1)]", "weight[-x.size(1):]"),
        ("if padding.any():", "if False:"),
        ("x = encoder.layer_norm(x)", "pass"),
        ("mel.to(encoder.conv1.weight.dtype)", "mel"),
    ],
    "decode_query": [
        ("prefix.mask.sum(1, keepdim=True) +", "prefix.mask.size(1) +"),
        ("audio_tokens=audio_tokens)", "audio_tokens=audio_tokens).detach()"),
        ("cache = copy.copy(prefix.cache)", "cache = prefix.cache"),
        ("Prefix(cache, mask, prefix.shift)", "Prefix(cache, prefix.mask, prefix.shift)"),
        (".tril()", ""),
    ],
    "forward_backward": [
        ("(batch, alpha, temperature, n_tokens)", "(batch, alpha, temperature)"),
        ("(loss * world_size)", "loss"),
        ("processes.all_reduce(sums.tolist(), device)", "sums"),
        ("n_tokens, = processes.all_reduce([n_tokens], device)", "pass"),
        ("processes.to_device(batch, device)", "batch"),
    ],
    "collate": [
        ("[IGNORE] * len(question + prompt) +", "[IGNORE] * len(question) + prompt +"),
        ("left=not answers", "left=False"),
        ('sample.get("after", instruction)', 'samples[0].get("after", instruction)'),
        (' and mel_extractor', ""),
        ("answer_ids = [[] for", 'answer_ids = [s["answer"][:0] for s in samples] and [[] for'),
    ],
    "paired_bootstrap": [
        ("0.025", "0.05"),
        ("torch.randint(len(difference),", "torch.randint(len(difference) - 1,"),
        ("(draws, len(difference))", "(2000, len(difference))"),
        ("manual_seed(seed)", "manual_seed(0)"),
        ("questions].mean(1)", "questions].mean(1) + difference.flip(0)[questions].mean(1)"),
    ],
    "seed_interval": [
        ("statistics.stdev(", "statistics.pstdev("),
        ("half = t *", "half = 1.96 *"),
        ("min(len(differences), 10)", "len(differences)"),
        ("sum(before, []), sum(after, [])", "before[0], after[0]"),
        ("mean = statistics.fmean(differences)",
         "mean = 100 * (statistics.fmean(sum(after, [])) - statistics.fmean(sum(before, [])))"),
    ],
}

RIGHT = {
    "self_kd_loss": [
        ("assert 0 <= alpha <= 1, f", "if alpha < 0 or alpha > 1: raise ValueError("
         "f\"{alpha}\")\n    f"),
        ("(teacher.exp() * ratio).sum()",
         'F.kl_div(student, teacher, reduction="sum", log_target=True)'),
    ],
    "learning_rate": [("peak * (step + 1) / warmup", "peak * step / warmup"), ("round(", "int(")],
    "train_only": [
        ('self.audio_encoder.requires_grad_(part == "audio")',
         'self.audio_encoder.requires_grad_(part != "projector")'),
        ("self.requires_grad_(False)\n", "for p in self.parameters(): p.requires_grad = False\n"),
    ],
    "answer_logits": [
        ("(prefix, query, audio_tokens)", "(prefix, query=query, audio_tokens=audio_tokens)"),
        ("[:, :-1][is_answer])", "[:, :-1].flatten(0, 1)[is_answer.flatten()])"),
    ],
    "embed": [
        ("ids.masked_fill(is_audio, 0)", "ids.clamp(min=0)"),
        ("x = x.masked_scatter(is_audio[..., None],", "x = x.index_put(torch.where(is_audio),"),
    ],
    "encode_audio": [
        ("x.unflatten(1, (-1, 2)).mean(2)", "F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)"),
        ("if padding.any():", "if True:"),
    ],
    "decode_query": [
        ("attention_mask=mask", "attention_mask=mask.int() if mask.dim() == 2 else mask"),
        ("cache = copy.copy(prefix.cache)", "cache = type(prefix.cache)()\n        "
         "for i, layer in enumerate(prefix.cache.layers):\n            "
         "cache.update(layer.keys, layer.values, i)"),
    ],
    "forward_backward": [
        ("world_size > 1 and i < len(micro_batches) - 1", "False"),
        ("torch.zeros(3, dtype=torch.float64)", "torch.zeros(3)"),
    ],
    "collate": [
        ("[IGNORE] * len(question + prompt) +", "[IGNORE] * (len(ids[-1]) - len(answer)) +"),
        ("pad(prefix_ids, tokenizer.pad_token_id)",
         "pad(rows=prefix_ids, value=tokenizer.pad_token_id, left=False)"),
    ],
    "paired_bootstrap": [
        ("means[int(0.025 * draws)], means[int(0.975 * draws)]",
         "means.quantile(0.025), means.quantile(0.975)"),
        ("torch.randint(len(difference), (draws, len(difference)), generator=generator)",
         "(torch.rand(draws, len(a), generator=generator).double() * len(a)).long()"),
    ],
    "seed_interval": [
        ('"Student\'s t over the seeds"', '"t"'),
        ("sum(before, []), sum(after, [])",
         "*([x for s in run for x in s] for run in (before, after))"),
    ],
}
