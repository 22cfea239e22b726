-- forget: look which queues hold something, and take the names of empty ones that nobody uses out of the set.
-- KEYS  1 sub:queues
-- ARGV  1 how many of the names that follow may be forgotten   2.. names of queues
-- Returns for each name 1 where one of its lists, those of all priorities, is there, 2 where there is none and it is
-- forgotten, else 0. That is one step: who pushes later names the queue again, or a scan finds it.
local queues_key = KEYS[1]
local old_count = ARGV[1]
local most = may('SREM', queues_key, 'member') and tonumber(old_count) or 0
local reply = {}
for n = 2, #ARGV do
  local list = CELERY .. ARGV[n]
  local found = try('EXISTS', list, list .. '\6\0223', list .. '\6\0226', list .. '\6\0229')
  if found ~= 0 then -- or it may not be looked at
    reply[n - 1] = 1
  else
    reply[n - 1] = n - 1 <= most and type(try('SREM', queues_key, ARGV[n])) == 'number' and 2 or 0
  end
end
return reply
