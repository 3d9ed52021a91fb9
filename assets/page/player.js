// Plays one stream over HTTP-FLV, and starts again when it ends.
'use strict';

const RETRY_MS = 1000;
const status = document.getElementById('status');
const video = document.querySelector('video');
const stream = document.body.dataset.stream;

function play() {
  const path = stream.split('/').map(encodeURIComponent).join('/');
  const source = { type: 'flv', isLive: true, url: new URL(`/${path}.flv`, location.href).href };
  const options = { enableStashBuffer: false, liveBufferLatencyChasing: true };
  const player = mpegts.createPlayer(source, options);
  let over = false;
  const again = (reason) => {
    if (over) return;
    over = true;
    status.textContent = `${reason}; trying again`;
    setTimeout(() => {
      player.destroy();
      play();
    }, RETRY_MS);
  };
  player.on(mpegts.Events.ERROR, (kind, detail) => again(`${kind}: ${detail}`));
  player.on(mpegts.Events.LOADING_COMPLETE, () => again('The stream ended'));
  player.attachMediaElement(video);
  player.load();
  // Browsers play with sound only after a click.
  player.play()?.catch(() => {
    video.muted = true;
    player.play()?.catch(() => {});
  });
}

video?.addEventListener('playing', () => {
  status.textContent = video.muted ? 'Live, without sound until you switch it on' : 'Live';
});
if (stream && !mpegts.isSupported()) {
  status.textContent = 'This browser cannot play live streams (no Media Source Extensions).';
} else if (stream) {
  play();
}
