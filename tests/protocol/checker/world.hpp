// The rest of the world: time that passes, keys that lapse, late calls, and a broker that restarts at its last fsync.
#pragma once

#include "client.hpp"
#include "worker.hpp"

inline void lapse_steps(const Stepper& step) {
  const State& state = step.state;
  const View& view = step.view;
  for (int worker = 0; worker < WORKERS; worker++)  // leases of those that are gone
    for (int incarnation = 0; incarnation <= state.workers[worker].incarnation; incarnation++) {
      const Worker& life = state.workers[worker];
      if (!view.has_lease(worker, incarnation) || (life.life == ALIVE && incarnation == life.incarnation)) continue;
      State after = step.begin(A_LEASE_LAPSES, worker, incarnation);
      perform(after, call_drop_lease(worker, incarnation));
      step.done(after, WORLD);
    }
  if (view.alone) {
    const Worker& holder = state.workers[view.alone - 1];
    if (holder.life != ALIVE || holder.incarnation != view.alone_incarnation || holder.alone == NOT_ALONE) {
      State after = step.begin(A_ALONE_LAPSES);
      perform(after, call_edit({"DEL\talone"}));
      step.done(after, WORLD);
    }
  }
  if (view.lately && state.budget[LATELY_EXPIRES]) {
    State after = step.begin(A_LATELY_LAPSES);
    after.budget[LATELY_EXPIRES]--;
    perform(after, call_edit({"DEL\tcancelled:lately"}));
    step.done(after, FAULT_STEP);
  }
}

inline void time_steps(const Stepper& step) {
  const State& state = step.state;
  const View& view = step.view;
  for (int task = 0; task < TASKS; task++) {
    if (view.scheduled[task] == WAITS_FOR_ITS_TIME) {
      State after = step.begin(A_TIME_COMES, 0, task);
      if (task == 0) after.eta_passed = 1;
      perform(after, call_edit({string("ZADD\tscheduled\t0\t") + TASK_NAMES[task]}));
      step.done(after, WORLD);
    }
    if (state.budget[RESULT_EXPIRES] && is_end(view.meta[task])) {
      State after = step.begin(A_RESULT_EXPIRES, 0, task);
      after.budget[RESULT_EXPIRES]--;
      after.result_expired[task] = 1;
      bool was_quiet = monitors.is_quiet;
      monitors.is_quiet = true;  // an end that goes with its time is none that was taken away
      perform(after, call_edit({"DEL\t" + META + TASK_NAMES[task]}));
      monitors.is_quiet = was_quiet;
      step.done(after, FAULT_STEP);
    }
  }
  if (scene.eta && !state.eta_passed) {
    State after = step.begin(A_ETA_PASSES);
    after.eta_passed = 1;
    step.done(after, WORLD);
  }
  if (state.budget[EXPIRE] && state.accepted[0]) {
    State after = step.begin(A_TASK_EXPIRES);
    after.budget[EXPIRE]--;
    after.expired[0] = 1;
    step.done(after, FAULT_STEP);
  }
  if (state.late_call >= 0) {
    State after = step.begin(A_LATE_CALL, state.late_worker);
    perform(after, broker->call(state.late_call));
    after.late_call = -1;
    after.late_worker = 0;
    after.late_numbers = 0;
    step.done(after, WORLD);
  }
}

inline void discovery_steps(const Stepper& step) {
  if (!scene.plain || step.state.queue_known || !step.view.queued[0]) return;
  for (int worker = 0; worker < WORKERS; worker++) {
    if (step.state.workers[worker].life != ALIVE) continue;
    State after = step.begin(A_DISCOVER, worker);
    after.queue_known = 1;
    perform(after, call_edit({"SADD\tsub:queues\tinference.m"}));
    step.done(after, worker * PER_WORKER + CHORES);
  }
}

// What `everysec` does not promise is forgotten by the monitors too.
inline void forget_what_was_lost(State& after) {
  const View& view = view_of(after);
  for (int task = 0; task < TASKS; task++) {
    bool ended = is_end(view.meta[task]);
    if (after.accepted[task] && !places(view, task) && !view.letter[task] && !ended)
      after.accepted[task] = after.waits[task] = 0;
    if (!ended) after.ends[task] = 0;
    if (after.cancel[task] == SAID_TRUE && view.meta[task] != IS_REVOKED) after.cancel[task] = VOID;
    if (after.cancel[task] == ASKED && !view.cancel_requests) after.cancel[task] = VOID;
    after.marked[task] = view.marked[task] || view.meta[task] == IS_REVOKED;
    after.starts[task] = 15;
    after.failed[task] = after.failed_at_checkpoint[task];
    after.failed_at_checkpoint[task] = 0;
  }
  if (scene.chain) {
    after.next_pushes = view.meta[0] == IS_SUCCESS;
    if (!after.next_pushes) after.next_ran = 0;
  }
  after.part_pushes = view.parts;
  after.webhooks = view.webhooks;
}

inline void rollback_steps(const Stepper& step) {
  const State& state = step.state;
  if (state.budget[ROLLBACK] && state.checkpoint < 0 && state.budget[CHECKPOINT]) {
    State after = step.begin(A_CHECKPOINT);
    after.budget[CHECKPOINT]--;
    after.checkpoint = state.broker;
    std::copy_n(state.failed, TASKS, after.failed_at_checkpoint);
    step.done(after, FAULT_STEP);
  }
  for (int lapsed = 0; state.budget[ROLLBACK] && state.checkpoint >= 0 && lapsed < 2; lapsed++) {
    State after = step.begin(A_ROLLBACK, 0, 0, lapsed);
    after.budget[ROLLBACK]--;
    after.broker = state.checkpoint;
    after.checkpoint = -1;
    if (lapsed) {
      vector<string> commands;
      for (int worker = 0; worker < WORKERS; worker++)
        for (int incarnation = 0; incarnation <= state.workers[worker].incarnation; incarnation++) {
          string key = worker_key(worker, incarnation);
          commands.push_back("DEL\t" + key + "\t" + key + ":info");
        }
      perform(after, call_edit(commands));
    }
    after.young = 1;
    forget_what_was_lost(after);
    step.done(after, FAULT_STEP);
  }
  if (!state.young) return;
  for (int worker = 0; worker < WORKERS; worker++)
    if (state.workers[worker].life == ALIVE && !step.view.has_lease(worker, state.workers[worker].incarnation)) return;
  State after = step.begin(A_OLD_ENOUGH);
  after.young = 0;
  step.done(after, WORLD);
}

// Every step that is possible in a state.
inline void all_steps(const State& state, const Emit& emit) {
  Stepper step(state, emit);
  client_steps(step);
  for (int worker = 0; worker < WORKERS; worker++) WorkerSteps(step, worker).take();
  discovery_steps(step);
  lapse_steps(step);
  time_steps(step);
  rollback_steps(step);
}

// Whether everything has come to its end.
inline bool is_goal(const State& state) {
  const View& view = view_of(state);
  if (state.submit < ACCEPTED) return false;
  if (scene.hang && state.cancel[0] == NOT_ASKED) return true;  // it is to run for ever
  bool somebody_lives = false;
  for (const auto& worker : state.workers) somebody_lives |= worker.life == ALIVE;
  if (!somebody_lives) return true;
  for (int task = 0; task < TASKS; task++) {
    bool ended = is_end(view.meta[task]);
    if (state.accepted[task] && !ended && !view.letter[task] && !state.result_expired[task]) return false;
    if (state.waits[task] == WAITING && (ended || state.accepted[task])) return false;
    if (state.cancel[task] == ASKED || places(view, task)) return false;
  }
  if (scene.chain && state.accepted[0] && state.waits[1] == WAITING) return false;
  if (scene.hook && state.ends[0] && !state.webhooks) return false;
  for (const auto& worker : state.workers)  // a late copy may hang for ever where everything does
    for (const auto& held : worker.held)
      if (held.place != NOWHERE && !scene.hang) return false;
  return !view.cancel_requests && !view.letter_requests;
}
