-- depths: how many messages lie in lists, and when the one that is next in each was submitted.
-- KEYS  1.. lists
-- Returns for each list that was looked into its length, -1 where this user may not ask, and the time in s since 1970,
-- as text; "" where the message does not say it, had to wait for a time of its own, or nothing lies there. A message can
-- only be read whole, so it ends once it has read DEPTHS_BYTES: the next call looks into the other lists.
local DEPTHS_BYTES = 2 ^ 20
local reply, read = {}, 0
for n = 1, #KEYS do
  local length = may('LLEN', KEYS[n]) and try('LLEN', KEYS[n]) or -1
  local sent = ''
  if type(length) ~= 'number' then -- a key that is no list has nothing in it
    length = 0
  elseif length > 0 then
    local message = call('LRANGE', KEYS[n], -1, -1)[1]
    read = read + #message
    local headers = string.sub(message, -16384)
    if not match(headers, '"eta": ?"') then
      sent = match(headers, '"samphire_sent_at": ?([0-9.]+)') or ''
    end
  end
  reply[2 * n - 1], reply[2 * n] = length, sent
  if read >= DEPTHS_BYTES then
    break
  end
end
return reply
