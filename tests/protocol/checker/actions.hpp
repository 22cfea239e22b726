// The atomic steps that actors take, as they are kept in traces.
#pragma once

#include <cstdint>

#include "scene.hpp"

enum ActionCode : uint8_t {
  A_INIT,
  A_SUBMIT,
  A_GIVE_UP,
  A_SUBMIT_AGAIN,
  A_DUPLICATE,
  A_SEND_AGAIN,
  A_CANCEL,
  A_REVOKE,
  A_POLL,
  A_CANCEL_REPEATED,
  A_REDRIVE,
  A_PURGE,
  A_PURGE_PUSHED,
  A_READ_STREAM,
  A_SWEEP,
  A_BEAT,
  A_CLAIM,
  A_CLAIM_INVALID,
  A_ADOPT,
  A_TRIED,
  A_START,
  A_FAST_START,
  A_FAST_GATE,
  A_FAST_END,
  A_GATE,
  A_RUN_END,
  A_APPEND,
  A_ALL_END,
  A_SETTLE,
  A_RELEASE,
  A_SCHEDULE,
  A_ROUTE,
  A_LOCAL_GATE,
  A_LOCAL_ASK,
  A_ALONE_ASK,
  A_ALONE_GATE,
  A_OTHERS,
  A_OTHERS_TIMEOUT,
  A_ALONE_BACK,
  A_ALONE_KEEP,
  A_CANCEL_CHORE,
  A_SEEK,
  A_SEEK_END,
  A_LETTERS_CHORE,
  A_DUE_CHORE,
  A_FOLLOW_CHORE,
  A_REAP,
  A_CRASH,
  A_RESTART,
  A_LEASE_LAPSES,
  A_ALONE_LAPSES,
  A_LATELY_LAPSES,
  A_TIME_COMES,
  A_ETA_PASSES,
  A_TASK_EXPIRES,
  A_RESULT_EXPIRES,
  A_LANE_FAILS,
  A_STOP,
  A_LEAVE,
  A_ENDPOINT_DOWN,
  A_ENDPOINT_UP,
  A_CHECKPOINT,
  A_ROLLBACK,
  A_OLD_ENOUGH,
  A_LATE_CALL,
  A_DISCOVER,
  A_ERRAND,
  A_ERRAND_END,
  ACTIONS
};

struct ActionText {
  const char* text;
  bool by_worker;
};

inline const ActionText ACTION_TEXTS[ACTIONS] = {{"init", false},
                                                 {"client submits", false},
                                                 {"client gives up the submit", false},
                                                 {"client submits again with the same key", false},
                                                 {"producer repeats its message", false},
                                                 {"producer sends the task again", false},
                                                 {"client asks to cancel", false},
                                                 {"Celery revoke", true},
                                                 {"client looks whether it is cancelled", false},
                                                 {"client asks to cancel once more", false},
                                                 {"client asks to redrive", false},
                                                 {"client reads a letter to purge", false},
                                                 {"client asks to purge", false},
                                                 {"client reads its stream", false},
                                                 {"client sweeps", false},
                                                 {"beat", true},
                                                 {"claim", true},
                                                 {"claim (and it is invalid)", true},
                                                 {"adopt", true},
                                                 {"reads tried", true},
                                                 {"start", true},
                                                 {"start beside the request", true},
                                                 {"goes to Triton (fast)", true},
                                                 {"Triton answers (fast)", true},
                                                 {"goes to Triton", true},
                                                 {"Triton answers", true},
                                                 {"appends an output", true},
                                                 {"what is everybody's goes down", true},
                                                 {"settle", true},
                                                 {"release", true},
                                                 {"schedule", true},
                                                 {"route", true},
                                                 {"enters the local gate alone", true},
                                                 {"waits for its turn", true},
                                                 {"alone?", true},
                                                 {"enters the gate, holding alone", true},
                                                 {"others under way?", true},
                                                 {"others did not end in time", true},
                                                 {"gives alone back", true},
                                                 {"keeps alone", true},
                                                 {"cancel chore", true},
                                                 {"names all queues", true},
                                                 {"cancel, after a look into all queues", true},
                                                 {"letters chore", true},
                                                 {"due chore", true},
                                                 {"follow chore", true},
                                                 {"reap", true},
                                                 {"worker crashes", true},
                                                 {"worker restarts", true},
                                                 {"lease lapses", true},
                                                 {"alone lapses", false},
                                                 {"cancelled:lately lapses", false},
                                                 {"time comes for", false},
                                                 {"eta passes", false},
                                                 {"ta expires", false},
                                                 {"result's lifetime ends", false},
                                                 {"lane fails and starts again", true},
                                                 {"worker is asked to end", true},
                                                 {"leave", true},
                                                 {"its endpoint dies", true},
                                                 {"its endpoint is back", true},
                                                 {"last fsync", false},
                                                 {"broker restarts at its last fsync", false},
                                                 {"reaping is allowed again", false},
                                                 {"a late call is carried out", true},
                                                 {"the queue is discovered", true},
                                                 {"errand: cancelled?", true},
                                                 {"errand: first step pushed", true}};

enum Outcome : uint8_t { OK, FAILS_RETRYABLE, FAILS_FOR_GOOD, GOES_AWAY = 5, WAS_ENDED };

enum HowLost : uint8_t { NOT_LOST, REPLY_LOST, CARRIED_OUT_LATE };

struct Action {
  uint8_t code, worker, which, detail, lost;
  // which: index of the held claim, or the task; of a reap: whose. detail: the outcome, or the incarnation.
};

inline string action_text(const Action& action) {
  string text = ACTION_TEXTS[action.code].text;
  if (ACTION_TEXTS[action.code].by_worker) text = string(1, static_cast<char>('A' + action.worker)) + ": " + text;
  switch (action.code) {
    case A_TIME_COMES:
    case A_RESULT_EXPIRES:
    case A_CANCEL:
    case A_REDRIVE:
    case A_PURGE:
    case A_PURGE_PUSHED:
    case A_CANCEL_REPEATED:
    case A_SEEK_END: text += string(" ") + TASK_NAMES[action.which]; break;
    case A_RUN_END:
    case A_FAST_END:
      text += action.detail == OK                ? ": ok"
              : action.detail == FAILS_RETRYABLE ? ": fails, retryable"
              : action.detail == FAILS_FOR_GOOD  ? ": fails for good"
                                                 : ": away";
      break;
    case A_ALL_END:
      text += action.detail == STUB_DIES       ? ": model process died"
              : action.detail == ENDPOINT_DIES ? ": endpoint died"
                                               : ": endpoint away";
      break;
    case A_REAP: text += " of " + worker_id(action.which, action.detail); break;
    case A_SETTLE:
      if (action.detail == 1) text += " (both outcomes in one call)";
      break;
    default: break;
  }
  if (action.lost == REPLY_LOST) text += "  << carried out, REPLY LOST >>";
  if (action.lost == CARRIED_OUT_LATE) text += "  << timed out, will be carried out LATE >>";
  return text;
}
