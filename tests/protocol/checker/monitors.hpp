// The properties. Each call of a script goes through `perform`, and each new state through `check_state`.
#pragma once

#include "actions.hpp"
#include "calls.hpp"

struct Violation {
  int at;  // the state before
  Action action;
  uint64_t count;
};

struct Monitors {
  std::map<string, Violation> found;
  int state_index = -1;
  Action action{};
  bool is_quiet = false;  // while a trace is told, or where the scene itself is set

  void violated(const string& property) {
    if (is_quiet) return;
    auto [at, is_new] = found.emplace(property, Violation{state_index, action, 0});
    at->second.count++;
    if (is_new) fprintf(stderr, "  violation %s at state %d\n", property.c_str(), state_index);
  }
};
inline Monitors monitors;

inline string named(int task) { return TASK_NAMES[task]; }

inline string if_expired(const State& state, int task) {
  return state.result_expired[task] ? " (its result had expired)" : "";
}

// A call and what came of it, as the monitors see it.
struct Seen {
  State& state;  // after the call
  const string& verb;
  const View &before, &after;
  const Done& done;
};

// What was named and was not past ending must not be started any more.
inline void watch_cancel(const Seen& seen) {
  for (size_t n = 0; n + 1 < seen.done.reply.items.size(); n += 2) {
    const string& verdict = seen.done.reply.items[n + 1].text;
    int task = task_of(seen.done.reply.items[n].text);
    if (task < 0) continue;
    bool is_refused = verdict == "unknown" || verdict.compare(0, 7, "nowhere") == 0 || verdict == "SUCCESS" ||
                      verdict == "FAILURE" || verdict == "REVOKED";
    if (!is_refused) seen.state.marked[task] = 1;
    if (verdict == "FAILURE" && (seen.before.sent_again[task] & ~seen.state.failed[task]))
      monitors.violated("P7 a cancel calls failed what was sent again and waits");
  }
}

inline void watch_attempts(const Seen& seen) {
  const View &before = seen.before, &after = seen.after;
  if (after.stray_start && !before.stray_start)
    monitors.violated("P4 a claim is started and not in flight, by " + seen.verb);
  if (seen.verb == "settle")
    for (int task = 0; task < TASKS; task++)
      if (after.scheduled[task] && !before.scheduled[task] && !is_end(after.meta[task]) &&
          after.attempts[task] != before.attempts[task] + 1)
        monitors.violated("P4 a retry counts no attempt");
  if (seen.verb == "reap")
    for (const auto& claim : before.claims) {
      bool still_there = false;
      for (const auto& other : after.claims) still_there |= claim.same_as(other);
      if (claim.started && !still_there && after.attempts[claim.task] <= before.attempts[claim.task])
        monitors.violated("P4 a lost worker's started task counts no attempt");
    }
  for (int task = 0; task < TASKS; task++) {
    if (after.attempts[task] > before.attempts[task]) {
      if (after.attempts[task] > scene.max) monitors.violated("P4 attempts exceed the budget, by " + seen.verb);
      if (after.attempts[task] > seen.state.starts[task])
        monitors.violated("P4 attempts exceed starts, by " + seen.verb);
    }
    if (after.letter[task] && !before.letter[task] && after.letter_attempts[task] > scene.max)
      monitors.violated("P4 letter tells more attempts than the budget");
  }
}

// A redrive, or a message that was sent again, begins a run; what runs by then is a start of it.
inline void begin_run(const Seen& seen, int task) {
  State& state = seen.state;
  state.ends[task] = state.starts[task] = state.marked[task] = 0;
  for (const auto& claim : seen.before.claims)
    state.starts[task] += claim.task == task && claim.started && !(state.failed[task] >> claim.sending & 1);
  state.runs[task]++;
  if (task == 0) state.next_pushes = state.part_pushes = state.next_ran = state.webhooks = 0;
  if (scene.rewait && state.waits[task] == TOLD) state.waits[task] = WAITING;
}

// Whether a claim of a task that this call has started or ended is of a message that has not failed. A start may be
// the repetition of one of which the reply was lost.
inline bool is_new_message(const Seen& seen, int task) {
  for (const auto& claim : seen.before.claims) {
    if (claim.task != task || (seen.state.failed[task] >> claim.sending & 1)) continue;
    bool is_touched = true;
    for (const auto& after : seen.after.claims)
      if (claim.same_as(after)) is_touched = seen.verb == "start" && after.started;
    if (is_touched) return true;
  }
  return false;
}

inline bool was_failed(const View& view, int task) {
  return view.meta[task] == IS_FAILURE || (view.meta[task] == NO_META && view.remembered[task] == 'F');
}

// Whether a message of a task that has failed waits, or runs, which is none of those that have.
inline bool waits_anew(const State& state, const View& view, int task) {
  int sendings = view.sent_again[task];
  if (view.scheduled[task]) sendings |= 1 << view.scheduled_sending[task];
  for (const auto& claim : view.claims)
    if (claim.task == task) sendings |= 1 << claim.sending;
  return was_failed(view, task) && (sendings & ~state.failed[task]);
}

// Whether a task that had failed was sent again, and this call begins its next run, or ends it at once.
inline bool is_sent_again(const Seen& seen, int task) {
  if (!was_failed(seen.before, task)) return false;
  if (seen.verb == "cancel") return seen.after.meta[task] == IS_REVOKED && waits_anew(seen.state, seen.before, task);
  return (seen.verb == "start" || seen.verb == "settle") && is_new_message(seen, task);
}

inline void watch_runs(const Seen& seen) {
  const View &before = seen.before, &after = seen.after;
  State& state = seen.state;
  for (int task = 0; task < TASKS; task++) {
    int was = before.meta[task], is = after.meta[task];
    bool gone = seen.verb == "letters" && before.letter[task] && !after.letter[task];
    bool redriven = gone && after.queued[task] + after.in_intake[task] > before.queued[task] + before.in_intake[task];
    bool freed = seen.verb == "letters" && was_failed(before, task) && !was_failed(after, task);
    bool again = is_sent_again(seen, task);
    if (is_end(was) && is != was && !freed && !again)
      monitors.violated("P3 " + named(task) + "'s end " + META_NAMES[was] + " became " + META_NAMES[is] + " by " +
                        seen.verb);
    if (redriven) {
      state.redriven[task] = 1;
      state.failed[task] = 0;
    }
    if (redriven || freed || again) begin_run(seen, task);
    if (gone && !redriven && state.purge_run[task] != before.letter_run[task])
      monitors.violated("P9 a letter is purged that nobody asked to purge (another run's)");
  }
}

// Claims of a task that this call has ended, dropped or put aside.
inline vector<Claim> claims_gone(const Seen& seen, int task) {
  vector<Claim> gone;
  for (const auto& claim : seen.before.claims) {
    bool still_there = false;
    for (const auto& after : seen.after.claims) still_there |= claim.same_as(after);
    if (claim.task == task && !still_there) gone.push_back(claim);
  }
  return gone;
}

inline bool is_end_published(const Seen& seen, int task) {
  for (const auto& effect : seen.done.effects)
    if (effect.kind == 'P' && effect.where == META + TASK_NAMES[task] && is_end(meta_of(effect.what))) return true;
  return false;
}

// What failed has a letter; what was sent again has its own end, and a copy of what has failed has none.
inline void watch_failures(const Seen& seen) {
  if (seen.verb != "start" && seen.verb != "settle") return;
  for (int task = 0; task < TASKS; task++) {
    bool was = was_failed(seen.before, task), is = was_failed(seen.after, task);
    vector<Claim> gone = claims_gone(seen, task);
    bool some_new = false;
    for (const auto& claim : gone) some_new |= !(seen.state.failed[task] >> claim.sending & 1);
    if (!was && is && !gone.empty() && !seen.after.letter[task]) monitors.violated("P9 a failure leaves no letter");
    if (was && is && some_new && !is_end_published(seen, task))
      monitors.violated("P2 what was sent again after a failure is dropped");
    if (!gone.empty() && !some_new && is_end_published(seen, task))
      monitors.violated("P2 a copy of a message that has failed ends a run");
  }
}

// A copy of what has failed now must not run: of the letter's message, and of those that have failed before it in the
// same call, which are all that are gone and not put aside.
inline void watch_what_failed(const Seen& seen, int task) {
  const View &before = seen.before, &after = seen.after;
  if (!after.letter[task] || after.letter_run[task] == before.letter_run[task]) return;
  seen.state.failed[task] |= 1 << after.letter_sending[task];
  if (!was_failed(after, task)) return;
  for (const auto& claim : claims_gone(seen, task))
    if (!after.scheduled[task] || after.scheduled_sending[task] != claim.sending)
      seen.state.failed[task] |= 1 << claim.sending;
}

inline void watch_letters(const Seen& seen) {
  const View &before = seen.before, &after = seen.after;
  State& state = seen.state;
  for (int task = 0; task < TASKS; task++) {
    if (seen.verb == "cancel" && !is_end(before.meta[task]) &&
        ((after.marked[task] && !before.marked[task]) || is_end(after.meta[task])))
      state.marked[task] = 1;
    if (before.letter[task] && !after.letter[task] && seen.verb != "letters" && seen.verb != "edit")
      monitors.violated("P9 letter lost by " + seen.verb);
    if (scene.poison && task > 0 && after.letter[task] && !before.letter[task])
      monitors.violated("I1 innocent " + named(task) + " is dead-lettered");
    if (after.scheduled[task] == ONLY_ITS_MESSAGE) monitors.violated("P1 scheduled:messages without scheduled");
    if (seen.verb == "settle") watch_what_failed(seen, task);
  }
}

inline void watch_starts(const Seen& seen) {
  for (const auto& claim : seen.after.claims) {
    if (!claim.started) continue;
    bool before = false;
    for (const auto& other : seen.before.claims) before |= claim.same_as(other) && other.started;
    if (before) continue;
    State& state = seen.state;
    int task = claim.task;
    if (state.starts[task] < 15) state.starts[task]++;
    if (state.failed[task] >> claim.sending & 1) monitors.violated("P2 a copy of a message that has failed is started");
    if (state.marked[task])
      monitors.violated("P7 " + named(task) + " is started after it was cancelled" + if_expired(state, task));
    state.redriven[task] = 0;
    if (task == 1) state.next_ran = 1;
  }
}

inline void watch_published_end(const Seen& seen, int task, int meta) {
  State& state = seen.state;
  if (++state.ends[task] > 1) {
    monitors.violated("P2 " + named(task) + " ended twice in one run: " + META_NAMES[meta] + " by " + seen.verb +
                      if_expired(state, task));
    state.ends[task] = 2;
  }
  if (meta == IS_SUCCESS && state.cancel[task] == SAID_TRUE)
    monitors.violated("P7 " + named(task) + " succeeded after cancel() said True" + if_expired(state, task));
  state.redriven[task] = 0;
}

inline void watch_settled_push(const Seen& seen, const Effect& effect) {
  State& state = seen.state;
  int task = task_of(effect.what);
  if (effect.where == LISTS[0] && scene.chain && task == 1) {
    state.accepted[1] = 1;
    if (++state.next_pushes > 1) {
      monitors.violated("P8 next step pushed twice in a run");
      state.next_pushes = 2;
    }
    if (seen.after.meta[0] != IS_SUCCESS)
      monitors.violated(string("P8 next step pushed although ta ended ") + META_NAMES[seen.after.meta[0]]);
  }
  if (scene.canvas && task == 0) {
    if (state.accepted[0]) monitors.violated("P8 first step pushed twice");
    state.accepted[0] = 1;
  }
  if (effect.where == WEBHOOK_LIST && ++state.webhooks > 1) {
    monitors.violated("P11 a webhook is put out twice in a run");
    state.webhooks = 2;
  }
  if (effect.where == PART_LIST && ++state.part_pushes > 1) {
    monitors.violated("P8 chord part pushed twice in a run");
    state.part_pushes = 2;
  }
}

// How many different messages of a task this call has ended.
inline int messages_ended(const Seen& seen, int task) {
  int sendings = 0;
  for (const auto& claim : claims_gone(seen, task)) sendings |= 1 << claim.sending;
  return __builtin_popcount(sendings);
}

inline void watch_effects(const Seen& seen) {
  for (const auto& effect : seen.done.effects)
    if (effect.kind == '!') monitors.violated("P10 an event is refused by the log, by " + seen.verb);
  bool succeeded = false, next_pushed = false, ended = false;
  int failed_now = 0;  // bits of the tasks of which a run has failed in this call
  for (const auto& effect : seen.done.effects) {
    if (effect.kind == 'P' && effect.where.compare(0, META.size(), META) == 0) {
      int task = task_of(effect.where.substr(META.size())), meta = meta_of(effect.what);
      if (task < 0) continue;
      // In one batch: the run that has failed, and the next one, of what was sent again.
      if ((failed_now >> task & 1) && messages_ended(seen, task) > 1) begin_run(seen, task);
      if (!is_end(meta)) continue;
      watch_published_end(seen, task, meta);
      if (meta == IS_FAILURE) failed_now |= 1 << task;
      succeeded |= task == 0 && meta == IS_SUCCESS;
      ended |= task == 0;
    }
    if (seen.verb == "settle" && effect.kind == 'L') {
      next_pushed |= effect.where == LISTS[0] && scene.chain && task_of(effect.what) == 1;
      watch_settled_push(seen, effect);
    }
  }
  // Of a task that is cancelled before it is claimed it is put out by whoever drops its message.
  if (scene.hook && ended && seen.verb == "settle" && !seen.state.webhooks)
    monitors.violated("P11 an end is committed without its webhook");
  if (scene.chain && succeeded && !next_pushed) monitors.violated("P8 ta succeeded and its next step was not pushed");
}

// Only who has the claim writes outputs.
inline void watch_append(const Seen& seen, const Call& call) {
  bool is_claimed = false;
  for (const auto& claim : seen.before.claims)
    is_claimed |= worker_id(claim.worker, claim.incarnation) == call.args[0] && claim.number == atoi(call.args[3].c_str());
  for (int task = 0; task < TASKS; task++)
    if (seen.after.logged[task] > seen.before.logged[task] && !is_claimed)
      monitors.violated("P10 a worker writes outputs without the claim");
}

inline const Done& perform(State& state, const Call& call) {
  const View& before = view_of(state);
  const Done& done = broker->run(state.broker, broker->number_of(call));
  state.broker = done.broker;
  Seen seen{state, call.verb, before, view_of(state), done};
  watch_runs(seen);
  if (call.verb == "cancel") watch_cancel(seen);
  watch_attempts(seen);
  watch_failures(seen);
  watch_letters(seen);
  if (call.verb == "start") watch_starts(seen);
  if (call.verb == "append") watch_append(seen, call);
  watch_effects(seen);
  return done;
}

// ---- what must hold of every state

inline void check_places(const State& state, const View& view) {
  for (int task = 0; task < TASKS; task++) {
    if (!state.accepted[task]) continue;
    int count = places(view, task);
    if (scene.canvas && task == 1) {
      if (!count && !places(view, 0) && !places(view, 3) && !is_end(view.meta[1]))
        monitors.violated("P1 the chain's end tb is lost");
      continue;
    }
    if (!count && !view.letter[task] && !is_end(view.meta[task]) && !state.result_expired[task])
      monitors.violated("P1 " + named(task) + " is lost");
    if (state.copies[task] || state.marked[task] || state.expired[task] || state.cancel[task] != NOT_ASKED) continue;
    if (count + view.letter[task] > 1) monitors.violated("P1 " + named(task) + " is in two places");
    if (count && is_end(view.meta[task]) && !(state.sendings[0] && waits_anew(state, view, task)))
      monitors.violated("P1 " + named(task) + " has ended and its message is still there");
  }
}

inline bool is_claimed(const View& view, const State& state, int worker, const Held& held) {
  for (const auto& claim : view.claims)
    if (claim.worker == worker && claim.incarnation == state.workers[worker].incarnation && claim.number == held.number)
      return true;
  return false;
}

inline void check_alone(const State& state, const View& view) {  // what is alone among workers is alone
  for (int one = 0; one < WORKERS; one++)
    for (const auto& held : state.workers[one].held) {
      if (held.place != ALONE_RUN || state.workers[one].life != ALIVE || !is_claimed(view, state, one, held)) continue;
      for (int other = 0; other < WORKERS; other++)
        for (const auto& beside : state.workers[other].held)
          if (other != one && state.workers[other].life == ALIVE && runs_at_triton(beside) &&
              is_claimed(view, state, other, beside))
            monitors.violated(string("A1 beside one that is alone among workers another runs (") +
                              PLACE_NAMES[beside.place] + ")");
    }
}

inline void check_state(const State& state) {
  const View& view = view_of(state);
  check_places(state, view);
  for (const auto& claim : view.claims) {
    const Worker& worker = state.workers[claim.worker];
    bool lives = worker.incarnation == claim.incarnation && worker.life == ALIVE;
    if (!view.is_member(claim.worker, claim.incarnation) && !lives)
      monitors.violated("P5 a message is in the in-flight hash of a gone worker that nobody will reap");
  }
  check_alone(state, view);
  if (!view.log_fault.empty()) monitors.violated("P10 " + view.log_fault);
}
