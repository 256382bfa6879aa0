"""Peers that cheat, and what becomes of them.

`adversary.py` holds the cheats, `arena.py` a swarm of real members in one process, `test_arena.py` what becomes of each
cheat in it, `test_processes.py` two of them as processes on a real DHT, `test_every_task.py` free riders and flipped
signs in every kind of task; `python -m benchmarks attacks` measures how soon. What is covered where (files without a
folder are in `tests/unit`):

=======================================================  ==========================================================
attack                                                   tests
=======================================================  ==========================================================
zero delta, noise, sign flip ×1 ×10 ×1000, scaling,      test_arena: a_cheat_is_banned_in_the_round_after…, and
fewer steps, easier shards, other batches, learning      without_audits_the_same_cheat_stays… as its control;
rate, flipped labels, a reducer's wrong code             test_processes for the sign flip and a free rider, and
                                                         test_every_task for both in every kind of task
a value that moved further than training can             test_protocol_rules: d1_…, test_averaging_allreduce:
                                                         a_sender_that_moved_a_value_further…
A Little Is Enough, inner product, time-coupled          test_averaging_rules and `benchmarks robustness` for
                                                         the harm; as deltas that were not trained they are the
                                                         first row
copycat                                                  test_arena: what_another_peer_trained…
one cheated segment of several                           test_arena: one_cheated_segment…; `benchmarks attacks`
stale base, other shards, another run                    test_protocol_rules: a_claim_that_breaks_a_rule…
half precision; drift below the tolerance                test_arena: half_precision…, a_drift_below… (not banned)
backdoor in one's own training                           as flipped labels; trigger rates are not measured
poison in private data                                   test_private (tests/attacks)
equivocation between members                             test_verify_conflict, test_averaging_allreduce:
                                                         two_receipts_for_one_part…;
                                                         test_arena: a_reducer_that_signs_two_results…
commit, then withhold; offline when audited              test_arena: a_peer_that_opens_nothing… (not banned)
a reducer that leaves a sender out                       not covered
weights, credit, bandwidth that a peer states            test_averaging_rules, test_averaging_shares
leader with two rosters                                  test_averaging_allreduce: a_group_told_in_two_ways…
replay, forgery, other encodings, another's ID           test_protocol_signing, _messages, _encoding,
                                                         test_peers_directory, test_peers_records
Sybil flood                                              test_protocol_admission: newcomers_together_weigh…,
                                                         a_flood_of_new_keys_moves_the_mean…; test_arena:
                                                         a_flood_of_new_keys_does_less_harm…
a new key after a ban                                    test_arena: after_a_ban_a_new_key_needs…
forged, reused, expired, foreign invites; invites        test_protocol_admission; test_arena: nobody_hears_a_
without end                                              stranger…, a_member_that_invites_without_end…
a banned key that comes again                            test_arena: a_banned_key…
DHT poisoning; eclipse of a joiner                       test_peers_directory; tests/sim: a_joiner_that_saw_nobody…
bogus state for a joiner                                 test_peers_sync, test_peers_exchange, tests/sim
a claimed round far ahead                                test_round_waits, test_protocol_rules:
                                                         an_attestation_that_breaks_a_rule…
malformed, huge, non-finite tensors; endless streams     test_protocol_tensors, test_averaging_codec,
                                                         test_averaging_allreduce, test_peers_streams
false accusation, accusation spam, tampered evidence     test_arena: accusations
lazy auditor                                             test_arena: an_auditor_that_checks_nobody…
colluding auditors                                       `benchmarks attacks`, five of sixteen
false hardware class                                     test_arena: honest_work_on_hardware…, a_cheat_is_banned…
grinding the draw                                        test_protocol_audits: over_many_rounds…: whatever the
                                                         state's digest, all are drawn alike
clock skew                                               tests/swarm/test_bad_luck
sleeper                                                  test_arena: a_peer_that_was_honest_for_long…
churn, partition, honest rounding                        tests/swarm/test_chaos, tests/sim; test_arena:
                                                         rounding_as_on_other_hardware…; `benchmarks attacks --honest`
=======================================================  ==========================================================
"""
