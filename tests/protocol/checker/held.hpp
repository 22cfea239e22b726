// What a lane does with one claim that it holds, step by step; after starting.py, asking.py, alone.py, endings.py and
// settler.py.
#pragma once

#include "lane.hpp"

class HeldSteps {
 public:
  HeldSteps(const Stepper& step, int worker, int slot)
      : step_(step),
        state_(step.state),
        worker_(worker),
        slot_(slot),
        life_(state_.workers[worker]),
        held_(life_.held[slot]),
        process_(worker * PER_WORKER + slot) {}

  void take() const {
    switch (held_.place) {
      case CAREFUL: careful(); break;
      case START:
      case LOCAL_START:
      case ALONE_START: start(); break;
      case FAST: fast_start(), fast_gate(), fast_end(); break;
      case GATE:
        if (gate_is_open(life_)) move(A_GATE, RUN);
        break;
      case RUN:
      case LOCAL_RUN:
      case ALONE_RUN: run_ends(); break;
      case PENDING: settle_steps(); break;
      case RELEASING: release(); break;
      case SCHEDULING: schedule(); break;
      case ROUTING: route(); break;
      case ERRAND: errand(); break;
      case ERRAND_START: errand_start(); break;
      case LOCAL_GATE:
        if (gate_is_empty(life_)) enter(A_LOCAL_GATE, LOCAL_START, IN_WORKER);
        break;
      case LOCAL_ASK:
        if (is_ones_turn(life_) && !is_another_alone()) move(A_LOCAL_ASK, LOCAL_GATE);
        break;
      case ALONE_ASK: ask_for_alone(); break;
      case ALONE_GATE:
        if (gate_is_empty(life_)) enter(A_ALONE_GATE, ALONE_OTHERS, AMONG_WORKERS);
        break;
      case ALONE_OTHERS: others_end(); break;
      default: break;
    }
  }

 private:
  State begin(ActionCode code, int detail = 0) const { return step_.begin(code, worker_, slot_, detail); }
  Held& mine(State& after) const { return after.workers[worker_].held[slot_]; }
  int numbers() const { return 1 << held_.number; }
  void lost(ActionCode code, const Call& call, int numbers) const {
    step_.may_be_lost(code, worker_, slot_, 0, call, numbers);
  }
  void move(ActionCode code, Place place) const {
    State after = begin(code);
    mine(after).place = place;
    step_.done(after, process_);
  }

  void enter(ActionCode code, Place place, Gated gated) const {
    State after = begin(code);
    mine(after).place = place;
    mine(after).gated = gated;
    step_.done(after, process_);
  }
  bool is_another_alone() const {
    return step_.view.alone && (step_.view.alone - 1 != worker_ || step_.view.alone_incarnation != life_.incarnation);
  }
  // Leave the gate without having begun.
  void step_back(State& after, Place place) const {
    mine(after).place = place;
    if (mine(after).gated == AMONG_WORKERS) after.workers[worker_].alone = GIVES_ALONE_BACK;
    mine(after).gated = NOT_GATED;
  }

  void careful() const {
    const View& view = step_.view;
    int task = held_.task, attempts = 0, crashes = 0, losses = 0, shared = 0;
    if (view.is_tried[task]) {
      attempts = view.attempts[task], crashes = view.crashes[task];
      losses = view.losses[task], shared = view.shared[task];
    }
    bool is_suspect = crashes > 0 && (crashes > 1 || attempts + 1 >= scene.max);
    if (attempts >= scene.max) {
      State after = begin(A_TRIED);
      mine(after).attempts = attempts;
      exhausted(after, worker_, slot_);
      step_.done(after, process_);
    } else if (losses >= 2 || is_suspect) {
      move(A_TRIED, losses >= 2 || shared > 0 ? ALONE_ASK : LOCAL_ASK);
    } else {
      move(A_TRIED, START);
    }
  }

  void start() const {
    Call call = call_start(worker_, life_.incarnation, held_);
    State after = begin(A_START);
    const Reply& reply = perform(after, call).reply;
    bool now = take_verdict(after, worker_, slot_, reply, false);
    Held& held = mine(after);
    if (!now && held_.place == LOCAL_START) step_back(after, LOCAL_ASK);
    if (!now && held_.place == ALONE_START) step_back(after, ALONE_ASK);
    if (now && held.place == held_.place)
      held.place = held_.place == START ? GATE : held_.place == LOCAL_START ? LOCAL_RUN : ALONE_RUN;
    step_.done(after, process_);
    lost(A_START, call, numbers());
  }

  void fast_start() const {
    if (held_.flags & STARTED) return;
    Call call = call_start(worker_, life_.incarnation, held_);
    State after = begin(A_FAST_START);
    take_verdict(after, worker_, slot_, perform(after, call).reply, true);
    Held& held = mine(after);
    if (held.place == FAST && (held_.flags & ANSWERED)) {  // Triton was quicker
      uint8_t kept = held_.flags & (BLAMED | ENDPOINT_DIED);
      if (held_.flags & (ANSWER_OK | ANSWER_RETRY)) {
        held.ending = ending_of(held_.flags & ANSWER_OK ? OK : FAILS_RETRYABLE, held);
        held.place = PENDING;
        held.flags = 0;
      } else {
        held.place = RELEASING;
        held.flags = kept;
      }
    }
    step_.done(after, process_);
    lost(A_FAST_START, call, numbers());
  }

  void fast_gate() const {
    if ((held_.flags & (AT_TRITON | ANSWERED)) || !gate_is_open(life_)) return;
    State after = begin(A_FAST_GATE);
    mine(after).flags |= AT_TRITON;
    step_.done(after, process_);
  }

  void fast_end() const {
    if (held_.flags & AT_TRITON) {
      if ((held_.flags & STARTED)) append();
      for (Outcome outcome : {OK, FAILS_RETRYABLE, FAILS_FOR_GOOD})
        if (may_come(state_, outcome) && !never_ends(held_) && life_.has_endpoint &&
            (outcome != OK || has_given_out_all()))
          fast_answer(outcome);
      if (!life_.has_endpoint) {
        State after = begin(A_FAST_END, GOES_AWAY);
        Held& held = mine(after);
        bool started = held_.flags & STARTED;
        held.was_asked = 1;
        if (started) held.place = RELEASING;
        held.flags = started ? 0 : ANSWERED;
        step_.done(after, process_);
      }
    }
    if ((held_.flags & ANSWERED) && (held_.flags & STARTED)) {  // by `all_end`
      State after = begin(A_FAST_END, WAS_ENDED);
      mine(after).place = RELEASING;
      mine(after).flags = held_.flags & (BLAMED | ENDPOINT_DIED);
      step_.done(after, process_);
    }
  }

  void fast_answer(Outcome outcome) const {
    bool started = held_.flags & STARTED;
    if (!started && outcome == FAILS_FOR_GOOD) return;  // as with FAILS_RETRYABLE
    State after = begin(A_FAST_END, outcome);
    pay_outcome(after, outcome);
    Held& held = mine(after);
    held.was_asked = 1;
    if (started) {
      held.place = PENDING;
      held.flags = 0;
      held.ending = ending_of(outcome, held_);
    } else {
      held.flags = ANSWERED | (outcome == OK ? ANSWER_OK : ANSWER_RETRY);
    }
    step_.done(after, outcome == OK ? process_ : FAULT_STEP);
  }

  // What a model gives out goes into the task's log, once the start is written.
  void append() const {
    if (held_.task != 0 || held_.outputs >= scene.stream || !life_.has_endpoint) return;
    Call call = call_append(worker_, life_.incarnation, held_);
    State after = begin(A_APPEND);
    long long verdict = perform(after, call).reply.items[0].integer;
    if (verdict == 1) {
      mine(after).outputs++;
    } else if (verdict == 0) {
      let_go(after, worker_, slot_);
    } else {
      mine(after).was_asked = 1;
      mine(after).place = RELEASING;
      mine(after).flags = 0;
    }
    step_.done(after, process_);
    lost(A_APPEND, call, numbers());
  }
  bool has_given_out_all() const { return held_.task != 0 || held_.outputs >= scene.stream; }

  void run_ends() const {
    append();
    for (Outcome outcome : {OK, FAILS_RETRYABLE, FAILS_FOR_GOOD}) {
      if (!may_come(state_, outcome) || never_ends(held_) || !life_.has_endpoint) continue;
      if (outcome == OK && !has_given_out_all()) continue;
      State after = begin(A_RUN_END, outcome);
      pay_outcome(after, outcome);
      to_settle(after, worker_, slot_, ending_of(outcome, held_));
      step_.done(after, outcome == OK ? process_ : FAULT_STEP);
    }
    if (life_.has_endpoint) return;
    State after = begin(A_RUN_END, GOES_AWAY);
    Held& held = mine(after);
    held.was_asked = 1;
    held.place = RELEASING;
    held.flags = 0;
    step_.done(after, process_);
  }

  void settle_steps() const {
    settle(0, {settlement(held_, held_.ending)}, {slot_});
    if (held_.second_ending)
      settle(1, {settlement(held_, held_.ending), settlement(held_, held_.second_ending)}, {slot_});
    for (int other = slot_ + 1; other < HELD; other++) {  // in one batch, in either order
      const Held& beside = life_.held[other];
      if (beside.place != PENDING) continue;
      string mine = settlement(held_, held_.ending), its = settlement(beside, beside.ending);
      settle(2, {mine, its}, {slot_, other});
      settle(3, {its, mine}, {other, slot_});
    }
  }

  void settle(int detail, const vector<string>& settlements, const vector<int>& slots) const {
    Call call = call_settle(worker_, life_.incarnation, settlements);
    State after = begin(A_SETTLE, detail);
    const Reply& reply = perform(after, call).reply;
    int numbers = 0;
    for (size_t n = 0; n < slots.size(); n++) {
      int slot = slots[n];
      Held& held = after.workers[worker_].held[slot];
      if (reply.items[n].integer == 2) {  // it was cancelled meanwhile
        held.ending = CANCELLED;
        held.second_ending = NO_END;
      } else if (reply.items[n].integer == 4) {  // the broker has lost outputs
        held.place = RELEASING;
        held.flags = 0;
        held.ending = held.second_ending;
        held.second_ending = NO_END;
      } else {
        let_go(after, worker_, slot);
      }
      numbers |= 1 << life_.held[slot].number;
    }
    step_.done(after, process_);
    step_.may_be_lost(A_SETTLE, worker_, slot_, detail, call, numbers);
  }

  void release() const {
    Call call = call_release(worker_, life_.incarnation, held_);
    State after = begin(A_RELEASE);
    perform(after, call);
    let_go(after, worker_, slot_);
    step_.done(after, process_);
    lost(A_RELEASE, call, numbers());
    if (held_.ending == NO_END) return;
    State cancelled = begin(A_SETTLE, 4);
    perform(cancelled, call_settle(worker_, life_.incarnation, {settlement(held_, held_.ending)}));
    mine(cancelled).ending = NO_END;
    step_.done(cancelled, process_);
  }

  void schedule() const {
    Call call = call_schedule(worker_, life_.incarnation, held_, state_.eta_passed);
    State after = begin(A_SCHEDULE);
    long long verdict = perform(after, call).reply.items[0].integer;
    if (verdict == -3)
      to_settle(after, worker_, slot_, CANCELLED);
    else if (verdict == 2)
      mine(after).place = held_.from_intake ? ROUTING : way_in(life_, held_);
    else
      mine(after).place = NOWHERE;
    step_.done(after, process_);
    lost(A_SCHEDULE, call, numbers());
  }

  void route() const {
    Call call = call_route(worker_, life_.incarnation, held_);
    State after = begin(A_ROUTE);
    perform(after, call);
    mine(after).place = NOWHERE;
    step_.done(after, process_);
    lost(A_ROUTE, call, numbers());
  }

  void errand() const {
    State after = begin(A_ERRAND);
    Held& held = mine(after);
    held.place = step_.view.marked[1] ? PENDING : ERRAND_START;
    if (step_.view.marked[1]) held.ending = CANCELLED;
    step_.done(after, process_);
  }

  void errand_start() const {
    Call call = call_settle(worker_, life_.incarnation, {errand_settlement(held_)});
    State after = begin(A_ERRAND_END);
    perform(after, call);
    mine(after).place = NOWHERE;
    step_.done(after, process_);
    lost(A_ERRAND_END, call, numbers());
  }

  // A number that no call has which is still to be carried out; of others there are enough.
  int another_hold() const {
    if (step_.state.late_call < 0) return 0;
    const Call& late = broker->call(step_.state.late_call);
    return late.verb == "alone" && late.args.back() == "0" ? 1 : 0;
  }

  void ask_for_alone() const {
    if (!is_ones_turn(life_)) return;
    int hold = another_hold();
    Call call = call_alone(worker_, life_.incarnation, true, hold);
    State after = begin(A_ALONE_ASK);
    if (perform(after, call).reply.integer >= 0) {
      after.workers[worker_].alone = HOLDS_ALONE;
      after.workers[worker_].hold = hold;
      mine(after).place = ALONE_GATE;
    }
    step_.done(after, process_);
    lost(A_ALONE_ASK, call, 0);
  }

  void others_end() const {
    State after = begin(A_OTHERS);
    long long under_way = perform(after, call_alone(worker_, life_.incarnation, true, life_.hold)).reply.integer;
    if (under_way == 0) {
      mine(after).place = ALONE_START;
    } else if (under_way < 0) {
      step_back(after, ALONE_ASK);
    }
    step_.done(after, process_);
    if (under_way <= 0) return;
    State late = begin(A_OTHERS_TIMEOUT);
    step_back(late, ALONE_ASK);
    step_.done(late, process_);
  }

  const Stepper& step_;
  const State& state_;
  int worker_, slot_;
  const Worker& life_;
  const Held& held_;
  int process_;
};
