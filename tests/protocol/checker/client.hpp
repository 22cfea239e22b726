// Clients: submit and repeat a submit, cancel, redrive, purge, read the stream and look at stored results.
#pragma once

#include "lane.hpp"
#include "stepper.hpp"

inline void submit_steps(const Stepper& step) {
  const State& state = step.state;
  if (state.submit < ACCEPTED) {
    Call call = scene.plain ? call_edit({"LPUSH\t" + LISTS[scene.intake ? 1 : 0] + "\t" + message_of(0)})
                            : call_submit(scene.canvas ? 3 : 0, "c0", scene.idem);
    State after = step.begin(A_SUBMIT);
    const Reply& reply = perform(after, call).reply;
    after.submit = ACCEPTED;
    after.accepted[0] = 1;
    if (!scene.plain && reply.items[0].text == "same" && reply.items[1].text != "ta") {
      after.accepted[0] = 0;
      monitors.violated("P6 the first submit got another id");
    }
    after.waits[0] = WAITING;
    if (scene.chain) after.waits[1] = WAITING;
    if (scene.canvas) {
      after.accepted[0] = after.waits[0] = 0;
      after.accepted[1] = 1;
    }
    step.done(after, CLIENT);
    if (state.submit == NOT_SUBMITTED && state.budget[LOST] && !scene.plain) {
      State lost = step.begin(A_SUBMIT, 0, 0, 0, REPLY_LOST);
      lost.budget[LOST]--;
      perform(lost, call);
      lost.submit = IN_DOUBT;
      step.done(lost, FAULT_STEP);
    }
    if (state.submit == IN_DOUBT && state.budget[GIVE_UP]) {
      State given_up = step.begin(A_GIVE_UP);
      given_up.budget[GIVE_UP]--;
      given_up.submit = GIVEN_UP;
      step.done(given_up, FAULT_STEP);
    }
  }
  if (state.budget[REPEAT_SUBMIT] && state.submit >= ACCEPTED) {
    State after = step.begin(A_SUBMIT_AGAIN);
    after.budget[REPEAT_SUBMIT]--;
    const Reply& reply = perform(after, call_submit(3, "c3", true)).reply;
    if (reply.items[0].text == "same") {
      if (reply.items[1].text != "ta") monitors.violated("P6 an idempotent repeat got another id");
      after.accepted[0] = 1;
      after.waits[0] = after.waits[0] == TOLD ? TOLD : WAITING;
      after.resubmitted = 1;
    } else {
      if (state.accepted[0]) monitors.violated("P6 an idempotent repeat was queued again");
      after.accepted[3] = 1;
      after.waits[3] = WAITING;
      after.resubmitted = 2;
    }
    step.done(after, FAULT_STEP);
  }
  if (state.budget[DUPLICATE] && state.submit >= ACCEPTED && state.accepted[0]) {
    State after = step.begin(A_DUPLICATE);
    after.budget[DUPLICATE]--;
    after.copies[0]++;
    perform(after, call_edit({"LPUSH\t" + LISTS[scene.intake ? 1 : 0] + "\t" + message_of(0)}));
    step.done(after, FAULT_STEP);
  }
  if (state.budget[SEND_AGAIN] && state.submit >= ACCEPTED && state.accepted[0]) {
    State after = step.begin(A_SEND_AGAIN);
    after.budget[SEND_AGAIN]--;
    after.copies[0]++;
    string message = message_of(0, ++after.sendings[0]);
    perform(after, call_edit({"LPUSH\t" + LISTS[scene.intake ? 1 : 0] + "\t" + message}));
    step.done(after, FAULT_STEP);
  }
}

inline bool is_somewhere(const View& view, int task) {
  bool as_canvas = scene.canvas && places(view, 3);
  bool as_next_step = scene.chain && task == 1 && !is_end(view.meta[0]) && places(view, 0);
  return places(view, task) || as_canvas || view.letter[task] || as_next_step;
}

inline bool is_sought(const State& state, int task) {  // in all queues, by some worker
  for (const auto& worker : state.workers)
    if (worker.life == ALIVE && (worker.seeks >> task & 1)) return true;
  return false;
}

inline void cancel_steps(const Stepper& step) {
  const State& state = step.state;
  const View& view = step.view;
  int task = scene.canceltask, meta = view.meta[task];
  if (state.budget[CANCEL] && state.submit >= ACCEPTED && state.cancel[task] == NOT_ASKED) {
    State after = step.begin(A_CANCEL, 0, task);
    after.budget[CANCEL]--;
    after.cancel[task] = ASKED;
    perform(after, call_edit({"RPUSH\tsub:cancels\t" + cancel_request(task)}));
    step.done(after, FAULT_STEP);
  }
  bool is_answered = view.answer[task] && meta == NO_META;
  if (state.cancel[task] == ASKED && (is_end(meta) || is_answered)) {
    State after = step.begin(A_POLL, 0, task);
    bool is_true = meta == IS_REVOKED || (!is_end(meta) && view.answer[task] == WAS_CANCELLED);
    bool is_unknown = !is_end(meta) && view.answer[task] == IS_UNKNOWN;
    after.cancel[task] = is_true ? SAID_TRUE : is_unknown ? SAID_UNKNOWN : SAID_FALSE;
    if (is_unknown && is_somewhere(view, task)) monitors.violated("P7 cancel() says unknown of a task that is there");
    bool has_failed = view.letter[task] && view.letter_run[task] == state.runs[task] + 1;
    if (is_true && has_failed && !after.marked[task])
      monitors.violated("P7 cancel() says True of a task that had failed");
    if (is_true && view.letter[task] && after.result_expired[task])
      monitors.violated("P7 cancel() says True of a dead letter whose result has expired");
    step.done(after, CLIENT);
  } else if (state.cancel[task] == ASKED && !view.cancel_requests && !is_sought(state, task) && !view.marked[task]) {
    State after = step.begin(A_CANCEL_REPEATED, 0, task);  // whoever had its request may have died
    perform(after, call_edit({"RPUSH\tsub:cancels\t" + cancel_request(task)}));
    step.done(after, CLIENT);
  }
  for (int worker = 0; state.budget[REVOKE] && state.submit >= ACCEPTED && worker < WORKERS; worker++) {
    if (state.workers[worker].life != ALIVE) continue;
    State after = step.begin(A_REVOKE, worker, task);
    after.budget[REVOKE]--;
    if (after.cancel[task] == NOT_ASKED) after.cancel[task] = REVOKED_BY_CELERY;
    const Reply& reply = perform(after, call_cancel(worker, state.workers[worker].incarnation, TASK_NAMES[task])).reply;
    take_cancel_verdicts(after, worker, reply);
    step.done(after, FAULT_STEP);
  }
}

inline void letter_steps(const Stepper& step) {
  const State& state = step.state;
  for (int task = 0; task < TASKS; task++) {
    if (state.purge_wanted[task]) {
      State after = step.begin(A_PURGE_PUSHED, 0, task);
      after.purge_wanted[task] = 0;
      string run = std::to_string(state.purge_run[task]);
      perform(after, call_edit({"RPUSH\tsub:letters\tpurge:" + run + " " + TASK_NAMES[task]}));
      step.done(after, CLIENT);
    }
    if (!step.view.letter[task]) continue;
    if (state.budget[REDRIVE]) {
      State after = step.begin(A_REDRIVE, 0, task);
      after.budget[REDRIVE]--;
      string run = std::to_string(step.view.letter_run[task]);
      perform(after, call_edit({"RPUSH\tsub:letters\tredrive:" + run + " " + TASK_NAMES[task]}));
      step.done(after, FAULT_STEP);
    }
    if (state.budget[PURGE]) {
      State after = step.begin(A_PURGE, 0, task);
      after.budget[PURGE]--;
      after.purge_run[task] = step.view.letter_run[task];
      after.purge_wanted[task] = 1;
      step.done(after, FAULT_STEP);
    }
  }
}

inline void waiter_steps(const Stepper& step) {
  const State& state = step.state;
  const View& view = step.view;
  if (view.events) {
    State after = step.begin(A_READ_STREAM);
    Keyspace keys = broker->keyspaces.keys(state.broker);
    for (const auto& entry : keys[CLIENT_STREAM].stream) {
      std::stringstream ids(entry[1]);
      for (string id; ids >> id;) {
        int task = task_of(id);
        if (task < 0) continue;
        if (after.waits[task] == WAITING && is_end(view.meta[task]))
          after.waits[task] = TOLD;
        else if (after.waits[task] == NOT_WAITING)
          after.passed[task] = 1;
      }
    }
    perform(after, call_edit({"DEL\t" + CLIENT_STREAM}));
    step.done(after, CLIENT);
  }
  bool some = false;
  State after = step.begin(A_SWEEP);
  for (int task = 0; task < TASKS; task++) {  // results, and what is remembered of ends whose results have expired
    bool has_ended = is_end(view.meta[task]) || (!view.meta[task] && view.remembered[task]);
    if (state.waits[task] == WAITING && has_ended && (scene.sweep || state.passed[task])) {
      after.waits[task] = TOLD;
      some = true;
    }
  }
  if (some) step.done(after, CLIENT);
}

inline void client_steps(const Stepper& step) {
  submit_steps(step);
  cancel_steps(step);
  letter_steps(step);
  waiter_steps(step);
}
