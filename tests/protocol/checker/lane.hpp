// A lane: what it does with each claim that it holds, after lane.py, dispatcher.py, starting.py, alone.py, locks.py and
// settler.py.
#pragma once

#include "stepper.hpp"

// ---- small changes of what a worker holds

inline void let_go(State& state, int worker, int slot) {
  Held& held = state.workers[worker].held[slot];
  bool held_alone = held.gated && held.place != NOWHERE && state.workers[worker].alone == HOLDS_ALONE;
  if (held_alone && held.gated == AMONG_WORKERS) state.workers[worker].alone = GIVES_ALONE_BACK;
  memset(&held, 0, sizeof held);
}

inline void to_settle(State& state, int worker, int slot, Ending ending) {
  Held& held = state.workers[worker].held[slot];
  held.was_asked |= runs_at_triton(held);
  held.place = PENDING;
  held.flags = 0;
  held.ending = ending;
}

inline Place way_in(const Worker& worker, const Held& held) {
  return worker.some_tried || !held.is_first ? CAREFUL : worker.some_cancelled ? START : FAST;
}

inline void take_in(State& state, int worker, int slot) {
  Held& held = state.workers[worker].held[slot];
  if (scene.canvas && held.task == 3) {
    held.place = ERRAND;
  } else if (state.expired[held.task]) {
    held.place = PENDING;
    held.ending = EXPIRED;
  } else if (scene.eta && held.task == 0 && !state.eta_passed) {
    held.place = SCHEDULING;
  } else {
    held.place = held.from_intake ? ROUTING : way_in(state.workers[worker], held);
  }
}

// What a worker does when it is told what has become of wishes to cancel.
inline void take_cancel_verdicts(State& state, int number, const Reply& reply) {
  Worker& worker = state.workers[number];
  for (size_t n = 0; n + 1 < reply.items.size(); n += 2) {
    int task = task_of(reply.items[n].text);
    if (reply.items[n + 1].text.compare(0, 7, "nowhere") == 0) worker.seeks |= 1 << task;
    if (reply.items[n + 1].text != "running") continue;
    for (int slot = 0; slot < HELD; slot++) {
      Held& held = worker.held[slot];
      if (held.place == NOWHERE || task != held.task || (held.flags & OVER)) continue;
      if (held.place == PENDING) {
        if (held.ending != CANCELLED && !held.second_ending) held.second_ending = CANCELLED;
        held.flags |= OVER;
      } else if (held.place == RELEASING || held.place == SCHEDULING || held.place == ROUTING) {
        held.ending = CANCELLED;
        held.flags |= OVER;
      } else {
        to_settle(state, number, slot, CANCELLED);
      }
    }
  }
}

// ---- the lock of the model

inline bool is_inside(const Held& held) { return held.gated || runs_at_triton(held); }

inline bool gate_is_open(const Worker& worker) {  // to those that need not be alone
  return std::none_of(worker.held, worker.held + HELD, [](const Held& held) {
    return held.gated || held.place == LOCAL_GATE || held.place == ALONE_GATE;
  });
}

// Whether nobody is inside, and nothing that was is without a written end.
inline bool gate_is_empty(const Worker& worker) {
  return std::none_of(worker.held, worker.held + HELD,
                      [](const Held& held) { return is_inside(held) || held.was_asked; });
}

// One suspect of a worker at a time stands at the gate, or is inside.
inline bool is_ones_turn(const Worker& worker) {
  return worker.alone == NOT_ALONE && std::none_of(worker.held, worker.held + HELD, [](const Held& held) {
           return held.gated || held.place == LOCAL_GATE || held.place == ALONE_GATE;
         });
}

// ---- what `start` said

inline void exhausted(State& state, int worker, int slot) {  // it has had all its attempts: this one is not made
  state.workers[worker].held[slot].attempts -= 1;
  to_settle(state, worker, slot, FAILED);
}

inline bool take_verdict(State& state, int worker, int slot, const Reply& reply, bool fast) {  // false: not yet
  Held& held = state.workers[worker].held[slot];
  const Reply& verdict = reply.items[0];
  int task = held.task;
  const View& view = view_of(state);
  if (verdict.type == 'i' && verdict.integer == -4) return false;
  if (verdict.type == 'i' && verdict.integer == -3) {
    if (state.redriven[task] && !state.marked[task])
      monitors.violated("P9 a redriven message of " + named(task) + " is dropped as cancelled, without a run");
    to_settle(state, worker, slot, CANCELLED);
    return true;
  }
  if (verdict.type == 'i' && verdict.integer < 0) {
    bool ended = verdict.integer == -2;
    if (ended && state.redriven[task] && view.meta[task] != IS_SUCCESS && !view.letter[task])
      monitors.violated("P9 a redriven message of " + named(task) + " is dropped as ended, without a run");
    if (ended && scene.chain && task == 1 && state.next_pushes && !state.next_ran)
      monitors.violated(string("P8 the next step of a run that succeeded is dropped, tb is ") +
                        META_NAMES[view.meta[task]]);
    let_go(state, worker, slot);
    return true;
  }
  if (verdict.type == 'a') {
    held.attempts = verdict.items[0].integer;
    held.crashes = verdict.items[1].integer;
    held.losses = verdict.items[2].integer;
  }
  if (held.attempts >= scene.max) {
    exhausted(state, worker, slot);
    return true;
  }
  if (fast) held.flags |= STARTED;
  return true;
}

inline Ending ending_of(Outcome outcome, const Held& held) {
  if (outcome == OK) return SUCCEEDED;
  return outcome == FAILS_FOR_GOOD || held.attempts + 1 >= scene.max ? FAILED : RETRYING;
}

inline bool never_ends(const Held& held) { return (scene.poison || scene.hang) && held.task == 0; }

inline bool may_come(const State& state, Outcome outcome) {
  return outcome == OK || state.budget[outcome == FAILS_RETRYABLE ? FAIL_RETRY : FAIL_FOR_GOOD];
}

inline void pay_outcome(State& state, Outcome outcome) {
  if (outcome != OK) state.budget[outcome == FAILS_RETRYABLE ? FAIL_RETRY : FAIL_FOR_GOOD]--;
}
