// A worker beside its claims: heartbeat, chores, the claim loop, reaping, its end; and what befalls it.
#pragma once

#include "held.hpp"

// Whatever runs on what is everybody's ends with it, in all workers.
inline void all_end(State& state, Fault kind) {
  for (auto& worker : state.workers) {
    if (worker.life != ALIVE) continue;
    for (auto& held : worker.held) {
      if (!runs_at_triton(held)) continue;
      uint8_t flags = kind == STUB_DIES ? BLAMED : kind == ENDPOINT_DIES ? ENDPOINT_DIED : 0;
      if (kind == ENDPOINT_DIES && held.place == ALONE_RUN && held.losses >= 2) flags |= BLAMED;
      held.was_asked = 1;
      if (held.place == FAST) {
        held.flags = (held.flags & STARTED) | ANSWERED | flags;
      } else {
        held.flags = flags;
        held.place = RELEASING;
      }
    }
  }
}

class WorkerSteps {
 public:
  WorkerSteps(const Stepper& step, int worker)
      : step_(step),
        state_(step.state),
        view_(step.view),
        worker_(worker),
        life_(state_.workers[worker]),
        incarnation_(life_.incarnation),
        first_process_(worker * PER_WORKER) {}

  void take() const {
    if (life_.life == DEAD && incarnation_ + 1 < scene.inc && state_.budget[RESTART]) restart();
    if (life_.life == ALIVE && !state_.young) reap_others();
    if (life_.life != ALIVE) return;
    beat_and_chores();
    keep_alone();
    claim_loop();
    for (int slot = 0; slot < HELD; slot++)
      if (life_.held[slot].place != NOWHERE) HeldSteps(step_, worker_, slot).take();
    shared_faults();
    own_faults();
    leave();
  }

 private:
  State begin(ActionCode code, int which = 0, int detail = 0) const {
    return step_.begin(code, worker_, which, detail);
  }
  void done(const State& after, int process) const { step_.done(after, first_process_ + process); }
  void fault(const State& after) const { step_.done(after, FAULT_STEP); }
  bool is_own(const Claim& claim) const { return claim.worker == worker_ && claim.incarnation == incarnation_; }
  int slot_of(int number) const {
    for (int slot = 0; slot < HELD; slot++)
      if (life_.held[slot].place != NOWHERE && life_.held[slot].number == number) return slot;
    return -1;
  }
  int free_slot() const {
    for (int slot = 0; slot < HELD; slot++)
      if (life_.held[slot].place == NOWHERE) return slot;
    return -1;
  }

  void restart() const {
    State after = begin(A_RESTART);
    after.budget[RESTART]--;
    Worker fresh{};
    fresh.incarnation = incarnation_ + 1;
    fresh.has_endpoint = fresh.must_adopt = 1;
    after.workers[worker_] = fresh;
    step_.done(after, scene.live ? SUPERVISOR : FAULT_STEP);
  }

  void reap_others() const {
    for (int other = 0; other < WORKERS; other++)
      for (int incarnation = 0; incarnation <= state_.workers[other].incarnation; incarnation++) {
        if (other == worker_ && incarnation == incarnation_) continue;
        const Worker& its = state_.workers[other];
        bool has_lease = view_.has_lease(other, incarnation);
        bool lives = incarnation == its.incarnation && its.life == ALIVE && has_lease;
        if (!view_.is_member(other, incarnation) || lives) continue;
        Call call = call_reap(other, incarnation, has_lease);
        State after = begin(A_REAP, other, incarnation);
        perform(after, call);
        done(after, REAPER);
        step_.may_be_lost(A_REAP, worker_, other, incarnation, call);
      }
  }

  void beat_and_chores() const {
    if (!view_.has_lease(worker_, incarnation_) || !view_.is_member(worker_, incarnation_)) {
      State after = begin(A_BEAT);
      perform(after, call_beat(worker_, incarnation_));
      done(after, CHORES);
    }
    if (view_.cancel_requests || has_something_to_be_told()) {
      Call call = call_cancel(worker_, incarnation_);
      State after = begin(A_CANCEL_CHORE);
      take_cancel_verdicts(after, worker_, perform(after, call).reply);
      done(after, CHORES);
      step_.may_be_lost(A_CANCEL_CHORE, worker_, 0, 0, call);
    }
    seek();
    if (view_.letter_requests) chore(A_LETTERS_CHORE, call_letters());
    if (std::count(view_.scheduled, view_.scheduled + TASKS, IS_DUE)) chore(A_DUE_CHORE, call_due());
    if (view_.follow_requests) chore(A_FOLLOW_CHORE, call_follow());
  }

  // Look for a task in all queues: name those that there are, and ask once more.
  void seek() const {
    bool is_named = broker->keyspaces.has_queue(state_.broker, "inference.m");
    for (int task = 0; task < TASKS; task++) {
      if (!(life_.seeks >> task & 1)) continue;
      if (!is_named && view_.queued[0] + view_.queued[1] > 0) {
        State after = begin(A_SEEK);
        perform(after, call_edit({"SADD\tsub:queues\tinference.m"}));
        done(after, CHORES);
        return;
      }
      Call call = call_cancel(worker_, incarnation_, "", {cancel_request(task)});
      State after = begin(A_SEEK_END, task);
      after.workers[worker_].seeks &= ~(1 << task);
      take_cancel_verdicts(after, worker_, perform(after, call).reply);
      done(after, CHORES);
      step_.may_be_lost(A_SEEK_END, worker_, task, 0, call);
    }
  }

  void chore(ActionCode code, const Call& call) const {
    State after = begin(code);
    perform(after, call);
    done(after, CHORES);
    step_.may_be_lost(code, worker_, 0, 0, call);
  }

  bool has_something_to_be_told() const {  // a mark on what it has started, and knows nothing of
    for (const auto& claim : view_.claims) {
      int slot = is_own(claim) && claim.started && view_.running[claim.task] ? slot_of(claim.number) : -1;
      if (slot < 0 || (life_.held[slot].flags & OVER)) continue;
      if (life_.held[slot].place != PENDING || life_.held[slot].ending != CANCELLED) return true;
    }
    return false;
  }

  void keep_alone() const {
    if (life_.alone == GIVES_ALONE_BACK) {
      Call call = call_alone(worker_, incarnation_, false, life_.hold);
      State after = begin(A_ALONE_BACK);
      perform(after, call);
      after.workers[worker_].alone = NOT_ALONE;
      after.workers[worker_].hold = 0;
      done(after, ALONE_KEEPER);
      step_.may_be_lost(A_ALONE_BACK, worker_, 0, 0, call);
    }
    if (life_.alone == HOLDS_ALONE && !view_.alone) {
      State after = begin(A_ALONE_KEEP);
      perform(after, call_alone(worker_, incarnation_, true, life_.hold));
      done(after, ALONE_KEEPER);
    }
  }

  void claim_loop() const {
    int slot = free_slot();
    if (life_.leaving || slot < 0) return;
    if (const Claim* strange = unknown_claim())
      adopt(*strange, slot);
    else if (life_.must_adopt)
      adopt_nothing();
    if (!life_.has_endpoint) return;
    bool queued = false;
    for (int task = 0; task < TASKS; task++) queued |= view_.queued[task] || view_.in_intake[task];
    if (!life_.must_adopt && queued && view_.has_lease(worker_, incarnation_)) claim(slot);
  }

  const Claim* unknown_claim() const {
    const Claim* found = nullptr;
    for (const auto& claim : view_.claims)
      if (is_own(claim) && slot_of(claim.number) < 0) found = &claim;
    return found;
  }

  void adopt(const Claim& claim, int slot) const {
    State after = begin(A_ADOPT, claim.number);
    Worker& worker = after.workers[worker_];
    Held& held = worker.held[slot];
    held.task = claim.task;
    held.number = claim.number;
    held.from_intake = claim.from_intake;
    held.is_first = claim.is_first;
    held.sending = claim.sending;
    perform(after, call_edit({"HDEL\t" + worker_key(worker_, incarnation_) + ":started\t" + field_of(held)}));
    worker.must_adopt = 0;
    worker.some_tried = worker.some_cancelled = 1;
    take_in(after, worker_, slot);
    done(after, CLAIMS);
  }

  void adopt_nothing() const {
    State after = begin(A_ADOPT);
    Worker& worker = after.workers[worker_];
    worker.must_adopt = 0;
    worker.some_tried = worker.some_cancelled = 1;
    done(after, CLAIMS);
  }

  int new_number() const {  // the smallest that nobody can take for another claim
    for (int number = 1;; number++) {
      bool used = state_.late_call >= 0 && state_.late_worker == worker_ && (state_.late_numbers >> number & 1);
      used |= slot_of(number) >= 0;
      auto taken = [&](const View& view) {
        for (const auto& claim : view.claims) used |= claim.worker == worker_ && claim.number == number;
      };
      taken(view_);
      if (state_.checkpoint >= 0) taken(broker->keyspaces.view(state_.checkpoint));
      if (!used) return number;
    }
  }

  void claim(int slot) const {
    int number = new_number();
    Call call = call_claim(worker_, incarnation_, number);
    State after = begin(A_CLAIM);
    const Reply& reply = perform(after, call).reply;
    Worker& worker = after.workers[worker_];
    worker.some_tried = reply.items[0].integer & 1;
    worker.some_cancelled = reply.items[0].integer >> 1 & 1;
    if (reply.items.size() > 1) {
      Held& held = worker.held[slot];
      held.number = number;
      held.from_intake = reply.items[1].text.find("inference.m") == string::npos;
      held.is_first = reply.items[1].text.find("!:") != string::npos;
      held.task = task_of(reply.items[3].text);
      held.sending = sending_of(reply.items[3].text);
      take_in(after, worker_, slot);
      done(after, CLAIMS);
      if (state_.budget[INVALID]) {
        begin(A_CLAIM_INVALID);
        State invalid = after;
        invalid.budget[INVALID]--;
        invalid.workers[worker_].held[slot].place = PENDING;
        invalid.workers[worker_].held[slot].ending = FAILED;
        fault(invalid);
      }
    }
    step_.may_be_lost(A_CLAIM, worker_, 0, 0, call, 1 << number,
                      [this](State& unsure) { unsure.workers[worker_].must_adopt = 1; });
  }

  // ---- what befalls it

  void shared_faults() const {
    bool some = false, poisoned = false;
    for (const auto& held : life_.held) {
      some |= runs_at_triton(held);
      poisoned |= runs_at_triton(held) && scene.poison && held.task == 0;
    }
    for (Fault kind : {STUB_DIES, ENDPOINT_DIES, AWAY})
      if (some && state_.budget[kind] && !scene.poison) {
        State after = begin(A_ALL_END, 0, kind);
        after.budget[kind]--;
        all_end(after, kind);
        fault(after);
      }
    if (poisoned && scene.poison > 1) {
      Fault kind = scene.poison == 2 ? STUB_DIES : ENDPOINT_DIES;
      State after = begin(A_ALL_END, 0, kind);
      all_end(after, kind);
      done(after, 0);
    }
    if (!state_.budget[CRASH] || (scene.poison == 1 && !poisoned)) return;
    State after = begin(A_CRASH);
    after.budget[CRASH]--;
    after.workers[worker_].life = DEAD;
    step_.done(after, scene.poison == 1 ? first_process_ : FAULT_STEP);
  }

  void own_faults() const {
    if (state_.budget[LAPSE] && view_.has_lease(worker_, incarnation_)) {
      State after = begin(A_LEASE_LAPSES, incarnation_);
      after.budget[LAPSE]--;
      perform(after, call_drop_lease(worker_, incarnation_));
      fault(after);
    }
    if (state_.budget[LANE_FAILS]) {
      State after = begin(A_LANE_FAILS);
      after.budget[LANE_FAILS]--;
      Worker& worker = after.workers[worker_];
      for (auto& held : worker.held) held.place = NOWHERE;
      worker.alone = worker.hold = 0;
      worker.seeks = 0;
      worker.must_adopt = 1;
      fault(after);
    }
    if (state_.budget[ENDPOINT_DOWN] && life_.has_endpoint) {
      State after = begin(A_ENDPOINT_DOWN);
      after.budget[ENDPOINT_DOWN]--;
      after.workers[worker_].has_endpoint = 0;
      fault(after);
    }
    if (!life_.has_endpoint && scene.epback) {
      State after = begin(A_ENDPOINT_UP);
      after.workers[worker_].has_endpoint = 1;
      step_.done(after, WORLD);
    }
    if (state_.budget[LEAVE] && !life_.leaving) {
      State after = begin(A_STOP);
      after.budget[LEAVE]--;
      after.workers[worker_].leaving = 1;
      fault(after);
    }
  }

  void leave() const {
    bool idle = life_.alone == NOT_ALONE;
    for (const auto& held : life_.held) idle &= held.place == NOWHERE;
    if (life_.leaving == 0 || !idle) return;
    Call call = call_leave(worker_, incarnation_);
    State after = begin(A_LEAVE);
    perform(after, call);
    after.workers[worker_].life = LEFT;
    done(after, CLAIMS);
    step_.may_be_lost(A_LEAVE, worker_, 0, 0, call);
  }

  const Stepper& step_;
  const State& state_;
  const View& view_;
  int worker_;
  const Worker& life_;
  int incarnation_, first_process_;
};
