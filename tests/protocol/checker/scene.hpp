// What is explored: the settings of a run, and the state that the checker adds to the broker's keyspace.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

using std::string;

#ifndef HELD
#define HELD 2  // claims that a worker can hold at once
#endif

constexpr int TASKS = 4, WORKERS = 2;
inline const char* const TASK_NAMES[TASKS] = {"ta", "tb", "tc", "td"};

// ---- settings: what the scene is, and how many faults of each kind there may be in a run

struct Scene {
  int tasks = 1;            // tasks; all but ta are queued at the start
  int max = 3;              // attempts that a task has
  int chain = 0;            // tb is the next step of ta
  int canvas = 0;           // the chain comes as `samphire.canvas`, td
  int part = 0;             // ta is part of a chord
  int idem = 0;             // ta is submitted with an idempotency key
  int eta = 0;              // ta is to run later
  int intake = 0;           // ta lies in the intake at first
  int plain = 0;            // a plain producer pushes ta; its queue is not known yet
  int sweep = 1;            // the client looks at stored results also without an event
  int inc = 1;              // lives of a worker
  int otherclient = 0;      // somebody else cancels
  int canceltask = 0;       // which task is cancelled
  int poison = 0;           // ta always takes down its worker (1), the model's process (2) or the endpoint (3)
  int hang = 0;             // ta never ends by itself
  int prealone = 0;         // tasks that were there at crashes before: bits of ta, tb, tc
  int epback = 0;           // an endpoint that died comes back
  int stream = 0;           // outputs that ta gives out, one after the other
  int hook = 0;             // a webhook tells of the end of ta
  int follow = 0;           // somebody wishes to follow ta from the start on
  int rewait = 0;           // after a redrive the client waits again
  int live = 0;             // look for liveness as well
  int states = 20'000'000;  // stop after so many
  int dump = 0;             // write about one in so many script runs for the conformance check
  int stop = 0;             // stop at the first violation
};
inline Scene scene;

inline const std::map<string, int Scene::*> SCENE_SETTINGS = {{"tasks", &Scene::tasks},
                                                              {"max", &Scene::max},
                                                              {"chain", &Scene::chain},
                                                              {"canvas", &Scene::canvas},
                                                              {"part", &Scene::part},
                                                              {"idem", &Scene::idem},
                                                              {"eta", &Scene::eta},
                                                              {"intake", &Scene::intake},
                                                              {"plain", &Scene::plain},
                                                              {"sweep", &Scene::sweep},
                                                              {"inc", &Scene::inc},
                                                              {"otherclient", &Scene::otherclient},
                                                              {"canceltask", &Scene::canceltask},
                                                              {"poison", &Scene::poison},
                                                              {"hang", &Scene::hang},
                                                              {"prealone", &Scene::prealone},
                                                              {"epback", &Scene::epback},
                                                              {"stream", &Scene::stream},
                                                              {"hook", &Scene::hook},
                                                              {"follow", &Scene::follow},
                                                              {"rewait", &Scene::rewait},
                                                              {"live", &Scene::live},
                                                              {"states", &Scene::states},
                                                              {"dump", &Scene::dump},
                                                              {"stop", &Scene::stop}};

enum Fault {
  CRASH,       // a worker's process dies
  LAPSE,       // a lease lapses although its worker lives
  LOST,        // a call is carried out and its reply is lost
  LATE_CALL,   // a caller gives a call up, and it is carried out later
  LANE_FAILS,  // a lane fails and starts again
  LEAVE,       // a worker is asked to end
  RESTART,     // a dead worker is started again
  DUPLICATE,   // a producer pushes its message once more
  SEND_AGAIN,  // a producer sends the task again: another message of the same id
  ROLLBACK,    // the broker restarts without what came after its last fsync (`everysec`)
  FAIL_RETRY,  // an attempt fails, and may be repeated
  FAIL_FOR_GOOD,
  INVALID,        // a message is found to be none when it is read
  STUB_DIES,      // the model's process dies
  ENDPOINT_DIES,  // Triton dies with what it works on
  AWAY,           // Triton does not answer
  ENDPOINT_DOWN,  // one worker's Triton goes
  CANCEL,
  REVOKE,
  REDRIVE,
  PURGE,
  REPEAT_SUBMIT,  // a second submit with the same idempotency key
  GIVE_UP,        // the client gives up a submit whose reply was lost
  RESULT_EXPIRES,
  LATELY_EXPIRES,  // `cancelled:lately`
  EXPIRE,          // ta has expired before it is started
  CHECKPOINT,      // (set with ROLLBACK)
  FAULTS
};
inline const char* const FAULT_NAMES[FAULTS] = {
    "crash",  "lapse",   "lost",  "late",    "lanef",  "leave",   "restart", "dup",    "again",
    "roll",   "failr",   "failp", "invalid", "stub",   "edied",   "away",    "epdown", "cancel",
    "revoke", "redrive", "purge", "resub",   "giveup", "metaexp", "lately",  "expire", "checkpoint"};

// ---- what a lane does with a claim

enum Place : uint8_t {
  NOWHERE,
  CAREFUL,  // looks what was tried of it before
  START,    // to be started
  FAST,     // start and request at the same time
  GATE,     // waits to pass the lock
  RUN,      // Triton works on it
  PENDING,  // its end is to be settled
  RELEASING,
  SCHEDULING,
  ROUTING,
  LOCAL_ASK,   // of a suspect: waits for its turn among those of its worker, and until no other worker is alone
  LOCAL_GATE,  // waits to be alone in this worker
  LOCAL_START,
  LOCAL_RUN,
  ALONE_ASK,  // of a suspect: waits for its turn, and to be alone among workers
  ALONE_GATE,
  ALONE_OTHERS,  // waits until others have ended what they had begun
  ALONE_START,
  ALONE_RUN,
  ERRAND,  // a canvas to start
  ERRAND_START
};
inline const char* const PLACE_NAMES[] = {
    "-",         "careful",    "start",   "fast",        "gate",       "run",         "pending",
    "releasing", "scheduling", "routing", "local?",      "local gate", "local start", "local run",
    "alone?",    "alone gate", "others?", "alone start", "alone run",  "errand",      "errand start"};

enum Ending : uint8_t { NO_END, SUCCEEDED, FAILED, RETRYING, CANCELLED, EXPIRED };
inline const char* const ENDING_NAMES[] = {"", "succeeded", "failed", "retrying", "cancelled", "expired"};

enum Flag : uint8_t {
  OVER = 1,            // cancelled while something else is under way with it
  STARTED = 2,         // (FAST) the start is written
  AT_TRITON = 4,       // (FAST) Triton works on it
  BLAMED = 8,          // (RELEASING) it counts as an attempt
  ENDPOINT_DIED = 16,  // (RELEASING) the endpoint died with it
  ANSWERED = 32,       // (FAST) Triton has answered, or is gone
  ANSWER_OK = 64,      // (FAST) and that was a success
  ANSWER_RETRY = 128   // (FAST) and that was a failure that may be repeated
};

enum Gated : uint8_t { NOT_GATED, IN_WORKER, AMONG_WORKERS };
enum Life : uint8_t { ALIVE, DEAD, LEFT };
enum HoldsAlone : uint8_t { NOT_ALONE, HOLDS_ALONE, GIVES_ALONE_BACK };
enum Submit : uint8_t { NOT_SUBMITTED, IN_DOUBT, ACCEPTED, GIVEN_UP };
enum Waits : uint8_t { NOT_WAITING, WAITING, TOLD };
enum CancelAnswer : uint8_t { NOT_ASKED, ASKED, SAID_TRUE, SAID_FALSE, SAID_UNKNOWN, REVOKED_BY_CELERY, VOID };

// Compared and hashed as bytes: no padding, and every byte is always set.
#pragma pack(push, 1)
struct Held {
  uint8_t place, task, number, from_intake, is_first, sending, flags, attempts, crashes, losses, ending, second_ending;
  uint8_t gated;      // it is alone in its worker until its end is written
  uint8_t was_asked;  // it has been at Triton, and its end is not yet written
  uint8_t outputs;    // that it has given out
};
struct Worker {
  uint8_t life, incarnation, must_adopt, some_tried, some_cancelled, has_endpoint, alone, leaving;
  uint8_t hold;   // number of the hold by which it is alone
  uint8_t seeks;  // bits of the tasks for which it looks in all queues, since they are in none that is known
  Held held[HELD];
};
struct State {
  int32_t broker;      // number of the keyspace
  int32_t checkpoint;  // that of the last fsync, or -1
  int32_t late_call;   // number of a call that is still to be carried out, or -1
  uint8_t late_worker;
  uint16_t late_numbers;  // bits of the claims' numbers that it names
  uint8_t young;          // the broker has just started: nobody is reaped
  uint8_t eta_passed, queue_known, resubmitted, submit;
  // what the monitors remember
  uint8_t next_pushes, part_pushes, next_ran, webhooks;
  uint8_t accepted[TASKS], waits[TASKS], cancel[TASKS], ends[TASKS], marked[TASKS], starts[TASKS], redriven[TASKS];
  uint8_t result_expired[TASKS], expired[TASKS], purge_run[TASKS], purge_wanted[TASKS], passed[TASKS], copies[TASKS];
  uint8_t runs[TASKS];
  uint8_t sendings[TASKS];  // how many messages of it were sent, copies not counted, after the first
  uint8_t failed[TASKS];    // bits of those that have failed: a copy of these must not run
  uint8_t failed_at_checkpoint[TASKS];  // the same at the last fsync, to which a restart goes back
  uint8_t budget[FAULTS];
  Worker workers[WORKERS];
};
#pragma pack(pop)

inline bool runs_at_triton(const Held& held) {
  return held.place == RUN || held.place == LOCAL_RUN || held.place == ALONE_RUN ||
         (held.place == FAST && (held.flags & AT_TRITON));
}

inline string worker_id(int worker, int incarnation) {
  return string(1, static_cast<char>('A' + worker)) + std::to_string(incarnation);
}

inline int task_of(const string& text) {  // whose message or key this is; -1: none
  for (int task = 0; task < TASKS; task++)
    if (text.compare(0, 2, TASK_NAMES[task]) == 0) return task;
  return -1;
}
